//! Count, mean and squared deviations of a stream of rewards.

/// Rewards from here on count as non-finite: the sum of their squared deviations could overflow.
pub const MAX_REWARD: f64 = 1e140;

/// Whether a reward may enter a history: it is a number, and below [`MAX_REWARD`] in magnitude.
#[must_use]
pub fn is_finite_reward(reward: f64) -> bool {
    reward.abs() < MAX_REWARD
}

/// Count, mean and `m2`, the sum of squared deviations from the mean.
///
/// Equal samples keep `mean` equal to them and `m2` at zero exactly, at any magnitude: both
/// [`push`](Self::push) and [`merge`](Self::merge) only ever add multiples of a difference.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// Number of samples.
    pub count: u64,
    /// Mean of the samples; 0 without any.
    pub mean: f64,
    /// Sum of squared deviations from the mean.
    pub m2: f64,
}

impl Moments {
    /// Adds one sample (Welford 1962).
    ///
    /// `n += 1; d = r - mean; mean += d / n; m2 += d * (r - mean)`
    pub fn push(&mut self, reward: f64) {
        self.count += 1;
        let delta = reward - self.mean;
        self.mean += delta / self.count as f64;
        self.m2 += delta * (reward - self.mean);
    }

    /// The moments of both sets of samples together (Chan, Golub and `LeVeque` 1979).
    ///
    /// `d = mb - ma; n = na + nb; mean = ma + d * nb / n; m2 = Sa + Sb + d * d * na * nb / n`
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        // Two empty sides would divide zero by zero; a single one is already neutral, and exactly so.
        if other.count == 0 {
            return self;
        }
        let count = self.count + other.count;
        let delta = other.mean - self.mean;
        let share = other.count as f64 / count as f64;
        Self {
            count,
            mean: self.mean + delta * share,
            m2: self.m2 + other.m2 + delta * delta * self.count as f64 * share,
        }
    }

    /// Standard deviation `sqrt(m2 / (count - ddof))`; 0 where `count <= ddof`.
    #[must_use]
    pub fn sigma(&self, ddof: u8) -> f64 {
        match self.count.checked_sub(u64::from(ddof)) {
            None | Some(0) => 0.0,
            Some(degrees) => (self.m2 / degrees as f64).sqrt(),
        }
    }
}

impl FromIterator<f64> for Moments {
    fn from_iter<I: IntoIterator<Item = f64>>(rewards: I) -> Self {
        let mut moments = Self::default();
        for reward in rewards {
            moments.push(reward);
        }
        moments
    }
}
