//! Options that tests and benches begin with.

use pgrpo_core::Options;
use pgrpo_core::estimators::pgrpo;

pub fn usual() -> Options {
    Options::new(&pgrpo::RULE)
}
