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
/// The mean is kept as `origin + offset`, with an origin near the samples that never changes: where
/// a mean of 1e8 with a deviation of 1e-3 would leave no digits for a step of the mean, the offset
/// has all of them. Equal samples keep `offset` and `m2` at zero exactly.
///
/// Counts are fractional where samples were weighted or forgotten.
///
/// ```
/// use pgrpo_core::Moments;
///
/// let [one, other]: [Moments; 2] = [[0.0, 1.0], [2.0, 3.0]].map(|part| part.into_iter().collect());
/// let both = one.merge(other);
/// assert_eq!((both.count, both.mean(), both.m2), (4.0, 1.5, 5.0));
/// assert_eq!(both.retract(other).unwrap().mean(), 0.5);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// Number of samples, or sum of their weights.
    pub count: f64,
    /// What `offset` is relative to.
    pub origin: f64,
    /// Mean of the samples less the origin.
    pub offset: f64,
    /// Sum of squared deviations from the mean.
    pub m2: f64,
}

impl Moments {
    /// Mean of the samples; 0 without any.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.origin + self.offset
    }

    /// Adds one sample (Welford 1962); the first one becomes the origin.
    ///
    /// `n += 1; d = r - mean; mean += d / n; m2 += d * (r - mean)`
    pub fn push(&mut self, reward: f64) {
        if self.count == 0.0 {
            self.origin = reward;
        }
        self.count += 1.0;
        let delta = (reward - self.origin) - self.offset;
        self.offset += delta / self.count;
        self.m2 += delta * ((reward - self.origin) - self.offset);
    }

    /// The same moments about another origin.
    #[must_use]
    pub fn about(self, origin: f64) -> Self {
        Self { origin, offset: (self.origin - origin) + self.offset, ..self }
    }

    /// The moments of both sets of samples together (Chan, Golub and `LeVeque` 1979), about the
    /// origin of `self` unless that is empty.
    ///
    /// `d = mb - ma; n = na + nb; mean = ma + d * nb / n; m2 = Sa + Sb + d * d * na * nb / n`
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        if other.count == 0.0 {
            return self;
        }
        if self.count == 0.0 {
            return other;
        }
        let count = self.count + other.count;
        let delta = (other.origin - self.origin) + (other.offset - self.offset);
        let share = other.count / count;
        Self {
            count,
            origin: self.origin,
            offset: self.offset + delta * share,
            m2: self.m2 + other.m2 + delta * delta * self.count * share,
        }
    }

    /// The moments of what is left of these samples when others, among them, are taken out: the
    /// inverse of [`merge`](Self::merge). None if the others are more than these.
    ///
    /// `n = nab - nb; d = mb - mab; mean = mab - d * nb / n; m2 = Sab - Sb - d * d * nb * nab / n`
    #[must_use]
    pub fn retract(self, other: Self) -> Option<Self> {
        let count = self.count - other.count;
        if other.count == 0.0 {
            return Some(self);
        }
        // Sums of weights differ from each other by rounding.
        let rounding = 1e-12 * self.count;
        if count < -rounding {
            return None;
        }
        if count <= rounding {
            return Some(Self { origin: self.origin, ..Self::default() });
        }
        let delta = (other.origin - self.origin) + (other.offset - self.offset);
        let share = other.count / count;
        Some(Self {
            count,
            origin: self.origin,
            offset: self.offset - delta * share,
            m2: (self.m2 - other.m2 - delta * delta * self.count * share).max(0.0),
        })
    }

    /// The moments with every sample counting `kept` times as much.
    #[must_use]
    pub fn decayed(self, kept: f64) -> Self {
        Self { count: self.count * kept, m2: self.m2 * kept, ..self }
    }

    /// The moments with all samples together counting as `count`; there must be some.
    #[must_use]
    pub fn counted_as(self, count: f64) -> Self {
        Self { count, m2: self.m2 * (count / self.count), ..self }
    }

    /// Standard deviation `sqrt(m2 / (count - ddof))`; 0 where `count <= ddof`.
    #[must_use]
    pub fn sigma(&self, ddof: u8) -> f64 {
        let degrees = self.count - f64::from(ddof);
        if degrees > 0.0 { (self.m2 / degrees).sqrt() } else { 0.0 }
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
