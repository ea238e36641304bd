//! The inner loops, compiled for the instruction sets of [`simd`].
#![allow(unsafe_code, reason = "calls across instruction sets, and stores past the caches")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::elements::{Affine, Id, Real, Row};
use crate::simd::{Level, level};

/// What a pass unwinds with.
struct Changed;

/// Ends a pass over ids that lead out of the table which was made for them: another thread has changed
/// them meanwhile. Unlike a panic it says nothing on the way to [`unless_changed`].
#[cold]
fn changed() -> ! {
    resume_unwind(Box::new(Changed))
}

/// The result of passes; None if ids were changed by another thread meanwhile.
pub(crate) fn unless_changed<T>(passes: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(passes)) {
        Ok(result) => Some(result),
        Err(payload) if payload.is::<Changed>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

#[inline(always)]
fn row_of<I: Id>(rows: &mut [Row], id: I) -> &mut Row {
    rows.get_mut(id.index()).unwrap_or_else(|| changed())
}

#[inline(always)]
fn place_of<T, I: Id>(places: &[T], id: I) -> &T {
    places.get(id.index()).unwrap_or_else(|| changed())
}

/// Adds a reward to its row, about the first one of that.
#[inline(always)]
pub(crate) fn push<R: Real, I: Id>(rows: &mut [Row], id: I, reward: R) {
    row_of(rows, id).push(reward.to_f64(), 1.0);
}

/// Whether eight ids are one.
#[inline(always)]
#[expect(clippy::needless_bitwise_bool, reason = "one comparison of registers, not seven branches")]
fn are_equal<I: Id>(ids: &[I; 8]) -> bool {
    ids[1..].iter().fold(true, |same, id| same & (*id == ids[0]))
}

/// Sums of a row for eight deviations: rollouts of a group come in a row.
#[inline(always)]
fn sums_of_8(d: [f64; 8]) -> [f64; 4] {
    let q: [f64; 8] = std::array::from_fn(|k| d[k] * d[k]);
    // A tree, in the order that registers of eight are summed up fastest.
    let pairs: [f64; 8] =
        std::array::from_fn(|k| if k % 2 == 0 { d[k] + d[k + 1] } else { q[k - 1] + q[k] });
    let fours: [f64; 4] = std::array::from_fn(|k| pairs[k] + pairs[k + 4]);
    [fours[0] + fours[2], fours[1] + fours[3], 8.0, 0.0]
}

/// Adds rewards to their rows, all about one shift.
///
/// The sums of eight of one row are held back as long as the next eight are of that row too: adding
/// to memory takes longer than to registers.
#[inline(always)]
fn about_body<R: Real, I: Id>(
    shift: f64,
    rewards: &[R],
    ids: &[I],
    rows: &mut [Row],
    sums_of_8: impl Fn([f64; 8]) -> [f64; 4],
) {
    let (rewards_by_8, rest) = rewards.as_chunks::<8>();
    let (ids_by_8, rest_ids) = ids.as_chunks::<8>();
    let (mut held, mut row) = ([0.0; 4], 0);
    for (rewards, ids) in rewards_by_8.iter().zip(ids_by_8) {
        let d: [f64; 8] = std::array::from_fn(|k| rewards[k].to_f64() - shift);
        if are_equal(ids) {
            let sums = sums_of_8(d);
            if row == ids[0].index() {
                held = std::array::from_fn(|k| held[k] + sums[k]);
            } else {
                rows.get_mut(row).unwrap_or_else(|| changed()).add(held);
                (held, row) = (sums, ids[0].index());
            }
        } else {
            for k in 0..8 {
                row_of(rows, ids[k]).add([d[k], d[k] * d[k], 1.0, 0.0]);
            }
        }
    }
    rows.get_mut(row).unwrap_or_else(|| changed()).add(held);
    for (reward, id) in rest.iter().zip(rest_ids) {
        let d = reward.to_f64() - shift;
        row_of(rows, *id).add([d, d * d, 1.0, 0.0]);
    }
}

/// The highest index of ids.
pub(crate) fn highest<I: Id>(ids: &[I]) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<I: Id>(ids: &[I]) -> usize {
            I::highest(ids)
        }
        if level() >= Level::Avx2 {
            // SAFETY: the processor has AVX2.
            return unsafe { avx2(ids) };
        }
    }
    I::highest(ids)
}

/// Defines functions that are compiled twice, for AVX2 as well, and call the version that can run.
///
/// AVX-512 is not among them: it makes gathers of the look-ups by id, which are slower than loads.
macro_rules! compile_for_avx2_too {
    ($($(#[$doc:meta])* fn $name:ident<R: Real, I: Id>($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        $($(#[$doc])*
        pub(crate) fn $name<R: Real, I: Id>($($argument: $type),*) {
            #[inline(always)]
            fn body<R: Real, I: Id>($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2<R: Real, I: Id>($($argument: $type),*) {
                    body($($argument),*);
                }
                if level() >= Level::Avx2 {
                    // SAFETY: the processor has AVX2.
                    return unsafe { avx2($($argument),*) };
                }
            }
            body($($argument),*);
        })*
    };
}

compile_for_avx2_too! {
    /// [`about`] without AVX-512.
    fn about_narrow<R: Real, I: Id>(shift: f64, rewards: &[R], ids: &[I], rows: &mut [Row]) {
        about_body(shift, rewards, ids, rows, sums_of_8);
    }

    /// Adds rewards to their rows, each about the first reward of its row.
    fn each<R: Real, I: Id>(rewards: &[R], ids: &[I], weights: Option<&[f64]>, rows: &mut [Row]) {
        if let Some(weights) = weights {
            for ((reward, id), &weight) in rewards.iter().zip(ids).zip(weights) {
                row_of(rows, *id).push(reward.to_f64(), weight);
            }
            return;
        }
        let (rewards_by_8, rest) = rewards.as_chunks::<8>();
        let (ids_by_8, rest_ids) = ids.as_chunks::<8>();
        for (rewards, ids) in rewards_by_8.iter().zip(ids_by_8) {
            let row = row_of(rows, ids[0]);
            if are_equal(ids) {
                let shift = row.shift_or(rewards[0].to_f64());
                row.add(sums_of_8(std::array::from_fn(|k| rewards[k].to_f64() - shift)));
            } else {
                for (reward, id) in rewards.iter().zip(ids) {
                    row_of(rows, *id).push(reward.to_f64(), 1.0);
                }
            }
        }
        for (reward, id) in rest.iter().zip(rest_ids) {
            row_of(rows, *id).push(reward.to_f64(), 1.0);
        }
    }

    /// Applies `[center, scale]` of each reward's cell.
    fn apply<R: Real, I: Id>(rewards: &[R], ids: &[I], pairs: &[[f64; 2]], out: &mut [R]) {
        let (rewards_by_8, rest) = rewards.as_chunks::<8>();
        let (ids_by_8, rest_ids) = ids.as_chunks::<8>();
        let (out_by_8, rest_out) = out.as_chunks_mut::<8>();
        for ((rewards, ids), out) in rewards_by_8.iter().zip(ids_by_8).zip(out_by_8) {
            if are_equal(ids) {
                let [center, scale] = *place_of(pairs, ids[0]);
                *out = rewards.map(|reward| R::from_f64((reward.to_f64() - center) * scale));
            } else {
                for k in 0..8 {
                    let [center, scale] = *place_of(pairs, ids[k]);
                    out[k] = R::from_f64((rewards[k].to_f64() - center) * scale);
                }
            }
        }
        for ((reward, id), out) in rest.iter().zip(rest_ids).zip(rest_out) {
            let [center, scale] = *place_of(pairs, *id);
            *out = R::from_f64((reward.to_f64() - center) * scale);
        }
    }

    /// The same without rounding the center.
    fn apply_exactly<R: Real, I: Id>(rewards: &[R], ids: &[I], maps: &[Affine], out: &mut [R]) {
        for ((reward, id), out) in rewards.iter().zip(ids).zip(out) {
            let &Affine { origin, offset, scale } = place_of(maps, *id);
            *out = R::from_f64(((reward.to_f64() - origin) - offset) * scale);
        }
    }
}

/// Adds rewards to their rows, all about one shift.
pub(crate) fn about<R: Real, I: Id>(shift: f64, rewards: &[R], ids: &[I], rows: &mut [Row]) {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        // SAFETY: the processor has AVX-512 F and DQ.
        return unsafe { avx512::about(shift, rewards, ids, rows) };
    }
    about_narrow(shift, rewards, ids, rows);
}

/// Cells whose maps fit into registers.
const PERMUTED: usize = 64;
/// Rewards from which loading the registers pays: a call of 64 rewards takes 0.92 to 0.97 of the time
/// without.
const PERMUTED_FROM: usize = 256;

/// [`apply`] for `f32` and few cells, whose maps are looked up in registers: false if this is not
/// the case.
pub(crate) fn permute<R: Real, I: Id>(
    rewards: &[R],
    ids: &[I],
    pairs: &[[f64; 2]],
    streamed: bool,
    out: &mut [R],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        if pairs.len() > PERMUTED || rewards.len() < PERMUTED_FROM || level() < Level::Avx512 {
            return false;
        }
        let (Some(rewards), Some(ids)) = (as_f32(rewards), as_u32(ids)) else { return false };
        let Some(out) = as_f32_mut(out) else { return false };
        // Beyond the range of f32 a product with 0 would be NaN.
        if !pairs.iter().all(|pair| pair.iter().all(|number| number.abs() < 1e30)) {
            return false;
        }
        // SAFETY: the processor has AVX-512 F and FMA.
        unsafe { avx512::permute(rewards, ids, pairs, streamed, out) };
        true
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (rewards, ids, pairs, streamed, out);
        false
    }
}

#[cfg(target_arch = "x86_64")]
fn as_f32<R: Real>(slice: &[R]) -> Option<&[f32]> {
    // SAFETY: it is the same type.
    (std::any::TypeId::of::<R>() == std::any::TypeId::of::<f32>())
        .then(|| unsafe { std::slice::from_raw_parts(slice.as_ptr().cast(), slice.len()) })
}

#[cfg(target_arch = "x86_64")]
fn as_f32_mut<R: Real>(slice: &mut [R]) -> Option<&mut [f32]> {
    // SAFETY: it is the same type.
    (std::any::TypeId::of::<R>() == std::any::TypeId::of::<f32>())
        .then(|| unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast(), slice.len()) })
}

#[cfg(target_arch = "x86_64")]
fn as_u32<I: Id>(slice: &[I]) -> Option<&[u32]> {
    // SAFETY: every 32-bit id is a u32 as it lies in memory.
    (size_of::<I>() == size_of::<u32>())
        .then(|| unsafe { std::slice::from_raw_parts(slice.as_ptr().cast(), slice.len()) })
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm_add_pd, _mm_cvtsd_f64, _mm_setzero_pd, _mm_sfence, _mm_unpackhi_pd, _mm256_add_pd,
        _mm256_castpd256_pd128, _mm256_extractf128_pd, _mm512_add_pd, _mm512_castpd512_pd256,
        _mm512_extractf64x4_pd, _mm512_fmadd_ps, _mm512_loadu_pd, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_mask_blend_ps, _mm512_mul_pd, _mm512_permutex2var_ps,
        _mm512_set1_epi32, _mm512_storeu_ps, _mm512_stream_ps, _mm512_sub_ps,
        _mm512_test_epi32_mask, _mm512_unpackhi_pd, _mm512_unpacklo_pd,
    };

    use super::{PERMUTED, about_body};
    use crate::elements::{Id, Real, Row};

    /// `about_narrow`, bit for bit.
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) fn about<R: Real, I: Id>(shift: f64, rewards: &[R], ids: &[I], rows: &mut [Row]) {
        about_body(shift, rewards, ids, rows, |d| {
            // SAFETY: eight numbers.
            let d = unsafe { _mm512_loadu_pd(d.as_ptr()) };
            let q = _mm512_mul_pd(d, d);
            let pairs = _mm512_add_pd(_mm512_unpacklo_pd(d, q), _mm512_unpackhi_pd(d, q));
            let upper = _mm512_extractf64x4_pd(pairs, 1);
            let fours = _mm256_add_pd(_mm512_castpd512_pd256(pairs), upper);
            let sums = _mm_add_pd(_mm256_castpd256_pd128(fours), _mm256_extractf128_pd(fours, 1));
            let squares = _mm_cvtsd_f64(_mm_unpackhi_pd(sums, _mm_setzero_pd()));
            [_mm_cvtsd_f64(sums), squares, 8.0, 0.0]
        });
    }

    /// `(r - high) * scale + low`, where the center is `high` less what is left of it in `low`. Each
    /// of the three roundings, and that of the scale, is 2^-25 of the advantage at most.
    #[target_feature(enable = "avx512f,fma")]
    #[expect(clippy::cast_possible_truncation, reason = "`low` holds what `high` leaves out")]
    pub(super) fn permute(
        rewards: &[f32],
        ids: &[u32],
        pairs: &[[f64; 2]],
        streamed: bool,
        out: &mut [f32],
    ) {
        let (mut high, mut low, mut scales) =
            ([0_f32; PERMUTED], [0_f32; PERMUTED], [0_f32; PERMUTED]);
        for (k, &[center, scale]) in pairs.iter().enumerate() {
            high[k] = center as f32;
            low[k] = ((f64::from(high[k]) - center) * scale) as f32;
            scales[k] = scale as f32;
        }
        // SAFETY: 16 floats from each of four quarters of 64.
        let registers = |table: &[f32; PERMUTED]| {
            [0, 16, 32, 48].map(|at| unsafe { _mm512_loadu_ps(table[at..at + 16].as_ptr()) })
        };
        let (highs, lows, scales_) = (registers(&high), registers(&low), registers(&scales));
        let upper = _mm512_set1_epi32(32);
        let one = |reward: f32, id: u32| {
            let k = id as usize % PERMUTED;
            (reward - high[k]).mul_add(scales[k], low[k])
        };
        // Rewards before the first aligned place of `out` are done one by one.
        let head = out.as_ptr().align_offset(64).min(out.len());
        for k in 0..head {
            out[k] = one(rewards[k], ids[k]);
        }
        let (rewards, ids, out) = (&rewards[head..], &ids[head..], &mut out[head..]);
        let (rewards_by_16, rest) = rewards.as_chunks::<16>();
        let (ids_by_16, rest_ids) = ids.as_chunks::<16>();
        let (out_by_16, rest_out) = out.as_chunks_mut::<16>();
        for ((rewards, ids), out) in rewards_by_16.iter().zip(ids_by_16).zip(out_by_16) {
            // SAFETY: each is 16 numbers of 4 bytes; `out` begins at a multiple of 64 bytes.
            unsafe {
                let ids = _mm512_loadu_si512(ids.as_ptr().cast());
                let in_upper = _mm512_test_epi32_mask(ids, upper);
                let look_up = |table: &[_; 4]| {
                    let [a, b, c, d] = *table;
                    let lower = _mm512_permutex2var_ps(a, ids, b);
                    _mm512_mask_blend_ps(in_upper, lower, _mm512_permutex2var_ps(c, ids, d))
                };
                let deviations = _mm512_sub_ps(_mm512_loadu_ps(rewards.as_ptr()), look_up(&highs));
                let advantages = _mm512_fmadd_ps(deviations, look_up(&scales_), look_up(&lows));
                if streamed {
                    _mm512_stream_ps(out.as_mut_ptr(), advantages);
                } else {
                    _mm512_storeu_ps(out.as_mut_ptr(), advantages);
                }
            }
        }
        for ((&reward, &id), out) in rest.iter().zip(rest_ids).zip(rest_out) {
            *out = one(reward, id);
        }
        // Stores past the caches are in no order with others until fenced.
        _mm_sfence();
    }
}
