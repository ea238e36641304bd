//! Options that tests and benches begin with. What users begin with, Python's `Options` says.

use pgrpo_core::estimators::pgrpo;
use pgrpo_core::{NanPolicy, Options, Order};

pub fn usual() -> Options {
    Options {
        estimator: &pgrpo::RULE,
        ddof: 0,
        eps: 1e-4,
        order: Order::UpdateThenNormalize,
        nan_policy: NanPolicy::Raise,
        forgetting: 1.0,
        prior_count: 0.0,
        sigma_floor: 0.0,
        clip: None,
        min_count: 1.0,
        frequency_weight: 0.0,
        track_diagnostics: false,
        track_delta: false,
        num_threads: 1,
    }
}
