//! Any options, and any calls with any arrays: no panic, a refused call changes nothing, what is
//! remembered can be saved and read again.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use pgrpo_core::{
    AnyId, Batch, Error, Ids, NanPolicy, Normalizer, Options, Order, RULES, Real, Snapshot,
    is_finite_reward,
};

fuzz_target!(|bytes: &[u8]| {
    // Bytes that end too early are no case.
    let _ = play(&mut Unstructured::new(bytes));
});

fn play(bytes: &mut Unstructured) -> Result<()> {
    let extreme = bytes.ratio(1, 4)?;
    let Ok(normalizer) = Normalizer::new(any_options(extreme, bytes)?) else { return Ok(()) };
    // Merging with itself doubles counts: they stay below 2^53.
    for _ in 0..40 {
        if bytes.is_empty() {
            break;
        }
        let before = normalizer.snapshot();
        let result = match bytes.int_in_range(0..=5)? {
            0 => normalizer.merge(&before),
            1 => normalizer.restore(&before),
            2 => normalizer.delta().map(drop),
            3 => call::<f32>(&normalizer, extreme, bytes)?,
            _ => call::<f64>(&normalizer, extreme, bytes)?,
        };
        let after = normalizer.snapshot();
        if result.is_err() {
            // As bytes, NaN equals itself.
            assert!(after.encode() == before.encode(), "{result:?}: {before:?}, {after:?}");
        }
        // Sums may overflow of the others.
        if !extreme {
            assert_eq!(Snapshot::decode(&after.encode()).as_ref(), Ok(&after));
        }
    }
    Ok(())
}

fn any_options(extreme: bool, bytes: &mut Unstructured) -> Result<Options> {
    Ok(Options {
        estimator: *bytes.choose(&RULES)?,
        ddof: bytes.int_in_range(0..=2)?,
        eps: any_option(extreme, 1e-4, bytes)?,
        order: bytes.choose(&Order::NAMES)?.1,
        nan_policy: bytes.choose(&NanPolicy::NAMES)?.1,
        forgetting: any_option(extreme, 1.0, bytes)?,
        prior_count: any_option(extreme, 0.0, bytes)?,
        sigma_floor: any_option(extreme, 0.0, bytes)?,
        clip: if bytes.arbitrary()? { Some(any_option(extreme, 1.0, bytes)?) } else { None },
        min_count: any_option(extreme, 1.0, bytes)?,
        frequency_weight: any_option(extreme, 0.0, bytes)?,
        track_diagnostics: bytes.arbitrary()?,
        track_delta: bytes.arbitrary()?,
        num_threads: bytes.int_in_range(0..=2)?,
    })
}

fn any_option(extreme: bool, usual: f64, bytes: &mut Unstructured) -> Result<f64> {
    Ok(match bytes.int_in_range(0..=7)? {
        0 if extreme => bytes.arbitrary()?,
        1 => 0.9,
        2 => 16.0,
        _ => usual,
    })
}

/// One call, and what holds of its advantages.
fn call<R: Real + Debug + PartialEq>(
    normalizer: &Normalizer,
    extreme: bool,
    bytes: &mut Unstructured,
) -> Result<std::result::Result<(), Error>> {
    let size = bytes.int_in_range(0..=12)?;
    let rewards: Vec<R> =
        (0..size).map(|_| any_reward(extreme, bytes).map(R::from_f64)).collect::<Result<_>>()?;
    let clusters = AnyIds::of(any_size(size, bytes)?, bytes)?;
    let groups = bytes.arbitrary::<bool>()?;
    let groups = groups.then(|| AnyIds::of(any_size(size, bytes)?, bytes)).transpose()?;
    let parents = bytes.arbitrary::<bool>()?;
    let parents = parents.then(|| AnyIds::of(any_size(size, bytes)?, bytes)).transpose()?;
    let mut any_weights = || {
        let given = bytes.ratio(1, 3)?;
        let weights = |bytes: &mut Unstructured| {
            (0..any_size(size, bytes)?).map(|_| any_weight(extreme, bytes)).collect()
        };
        given.then(|| weights(bytes)).transpose()
    };
    let weights: Option<Vec<f64>> = any_weights()?;
    let score_norms: Option<Vec<f64>> = any_weights()?;
    let lengths: Option<Vec<f64>> = any_weights()?;
    let batch = Batch {
        rewards: &rewards,
        clusters: clusters.borrow(),
        groups: groups.as_ref().map(AnyIds::borrow),
        parents: parents.as_ref().map(AnyIds::borrow),
        weights: weights.as_deref(),
        score_norms: score_norms.as_deref(),
        lengths: lengths.as_deref(),
    };
    let mut out = vec![R::from_f64(7.0); any_size(size, bytes)?];
    let result = match bytes.int_in_range(0..=4)? {
        0 => return Ok(normalizer.update(&batch)),
        1 => return Ok(normalizer.retract(&batch)),
        2 => {
            let before = normalizer.snapshot().encode();
            let result = normalizer.normalize(&batch, &mut out);
            assert!(normalizer.snapshot().encode() == before);
            result
        }
        _ => normalizer.advantages(&batch, &mut out),
    };
    if result.is_err() {
        assert!(out.iter().all(|&advantage| advantage == R::from_f64(7.0)), "{result:?}");
        return Ok(result);
    }
    let Options { nan_policy, clip, .. } = *normalizer.options();
    for (advantage, reward) in out.iter().zip(&rewards) {
        let (advantage, reward) = (advantage.to_f64(), reward.to_f64());
        if !is_finite_reward(reward) {
            assert_ne!(nan_policy, NanPolicy::Raise);
            let filling = if nan_policy == NanPolicy::Zero { 0.0 } else { f64::NAN };
            assert_eq!(advantage.to_bits(), filling.to_bits(), "{batch:?} of {normalizer:?}");
        } else if !extreme {
            assert!(!advantage.is_nan(), "{reward} in {batch:?} of {normalizer:?}");
            // As f32, the bound may be rounded up.
            let bound = clip.map_or(f64::INFINITY, |clip| R::from_f64(clip).to_f64().max(clip));
            assert!(advantage.abs() <= bound, "{advantage} of {reward} in {batch:?}");
        }
    }
    Ok(result)
}

fn any_size(usual: usize, bytes: &mut Unstructured) -> Result<usize> {
    if bytes.ratio(1, 32)? { bytes.int_in_range(0..=12) } else { Ok(usual) }
}

fn any_reward(extreme: bool, bytes: &mut Unstructured) -> Result<f64> {
    Ok(match bytes.int_in_range(0..=15)? {
        0 => f64::NAN,
        1 => f64::NEG_INFINITY,
        2 => 1e140,
        3 if extreme => bytes.arbitrary()?,
        4 => 1e8 + f64::from(bytes.arbitrary::<i8>()?),
        5 => f64::from(bytes.arbitrary::<f32>()?),
        _ => f64::from(bytes.arbitrary::<i8>()?) / 4.0,
    })
}

fn any_weight(extreme: bool, bytes: &mut Unstructured) -> Result<f64> {
    Ok(match bytes.int_in_range(0..=7)? {
        0 if extreme => bytes.arbitrary()?,
        1 => -0.5,
        2 => 0.0,
        3 => f64::NAN,
        _ => f64::from(bytes.arbitrary::<u8>()?) / 16.0,
    })
}

enum AnyIds {
    I32(Vec<i32>),
    I64(Vec<i64>),
    Any(Vec<AnyId<'static>>),
}

impl AnyIds {
    fn of(size: usize, bytes: &mut Unstructured) -> Result<Self> {
        /// The first and the last that are keys of their own are near 0 and 2^22; the latter would
        /// make each snapshot look at as many rows.
        const INTS: [i64; 10] = [-1, 0, 0, 1, 1, 2, 3, 999, 1 << 22, i64::MAX];
        const NAMES: [&str; 3] = ["", "a", "0"];
        Ok(match bytes.int_in_range(0..=3)? {
            0 => Self::I64(any(size, &INTS, bytes)?),
            1 => {
                let names = NAMES.map(AnyId::Name);
                let ints = INTS.map(AnyId::Int);
                Self::Any(any(size, &[&names[..], &ints].concat(), bytes)?)
            }
            _ => Self::I32(any(size, &[-1, 0, 0, 0, 1, 1, 2, 3, 20, i32::MAX], bytes)?),
        })
    }

    fn borrow(&self) -> Ids<'_> {
        match self {
            Self::I32(ids) => Ids::I32(ids),
            Self::I64(ids) => Ids::I64(ids),
            Self::Any(ids) => Ids::Any(ids),
        }
    }
}

fn any<T: Copy>(size: usize, of: &[T], bytes: &mut Unstructured) -> Result<Vec<T>> {
    (0..size).map(|_| bytes.choose(of).copied()).collect()
}
