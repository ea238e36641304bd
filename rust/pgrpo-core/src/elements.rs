//! What the passes over a batch read, sum up and apply.

use crate::moments::Moments;

/// A reward or an advantage as it lies in memory.
pub trait Real: Copy + Send + Sync + 'static {
    /// Error of an advantage, in units of 1, that may come from rounding what is subtracted.
    const NEGLIGIBLE: f64;
    /// The number, exactly.
    fn to_f64(self) -> f64;
    /// The nearest number.
    fn from_f64(value: f64) -> Self;
}

impl Real for f64 {
    const NEGLIGIBLE: f64 = 1e-15;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
}

impl Real for f32 {
    const NEGLIGIBLE: f64 = 1e-9;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the nearest f32 is what is asked for")]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

/// An id as it lies in memory.
pub(crate) trait Id: Copy + Eq + Send + Sync + 'static {
    /// Its place in a table of cells; a negative id has one beyond all tables.
    fn index(self) -> usize;
    /// The highest [`index`](Self::index); 0 of none.
    #[inline(always)]
    fn highest(ids: &[Self]) -> usize {
        ids.iter().fold(0, |highest, id| highest.max(id.index()))
    }
}

impl Id for u32 {
    #[inline(always)]
    fn index(self) -> usize {
        self as usize
    }
}

impl Id for i32 {
    #[inline(always)]
    fn index(self) -> usize {
        self.cast_unsigned() as usize
    }
    #[inline(always)]
    fn highest(ids: &[Self]) -> usize {
        // In 32 bits, eight at once.
        ids.iter().fold(0, |highest, id| id.cast_unsigned().max(highest)) as usize
    }
}

impl Id for i64 {
    #[inline(always)]
    fn index(self) -> usize {
        usize::try_from(self).unwrap_or(usize::MAX)
    }
}

/// Rewards of one cell about a shift: sum of deviations, sum of their squares, number, shift.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(crate) struct Row([f64; 4]);

/// A spread of which less than this part is left after subtraction is summed up again.
const CANCELLATION: f64 = 1.0 / 1024.0;

impl Row {
    #[inline(always)]
    pub(crate) fn add(&mut self, sums: [f64; 4]) {
        for (total, sum) in self.0.iter_mut().zip(sums) {
            *total += sum;
        }
    }

    /// The shift of a row whose sums are about it already.
    pub(crate) fn set_shift(&mut self, shift: f64) {
        self.0[3] = shift;
    }

    /// The shift, which is the first reward.
    #[inline(always)]
    pub(crate) fn shift_or(&mut self, first: f64) -> f64 {
        if self.0[2] == 0.0 {
            self.0[3] = first;
        }
        self.0[3]
    }

    #[inline(always)]
    pub(crate) fn push(&mut self, reward: f64, weight: f64) {
        let deviation = reward - self.shift_or(reward);
        self.0[0] += weight * deviation;
        self.0[1] += weight * deviation * deviation;
        self.0[2] += weight;
    }

    /// Whether two rewards or more were added, each of weight 1.
    pub(crate) fn has_several(self) -> bool {
        self.0[2] >= 2.0
    }

    pub(crate) fn moments(self) -> Moments {
        let Self([sum, squares, count, shift]) = self;
        if count == 0.0 {
            return Moments { origin: shift, ..Moments::default() };
        }
        let offset = sum / count;
        // The difference is NaN for non-finite rewards, and must stay so.
        let m2 = squares - sum * offset;
        Moments { count, origin: shift, offset, m2: if m2 < 0.0 { 0.0 } else { m2 } }
    }

    /// Whether ten bits or more of `m2` cancel out, the shift being far from the mean for so small a
    /// spread. Equal rewards are of this kind, and a single one: their `m2` must come out as 0, and
    /// their mean as what they are.
    pub(crate) fn cancels(self) -> bool {
        let Self([sum, squares, count, _]) = self;
        squares * count - sum * sum < CANCELLATION * squares * count
    }
}

/// What a cell does to its rewards: `A = ((r - origin) - offset) * scale`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Affine {
    /// Subtracted first, without loss where rewards are near it.
    pub origin: f64,
    /// Subtracted then.
    pub offset: f64,
    /// Multiplied with.
    pub scale: f64,
}
