//! Which instruction set the passes over a batch may use.

use std::sync::OnceLock;

/// Instruction sets that the passes are compiled for, beside the one every processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the target guarantees.
    Baseline,
    /// AVX2.
    Avx2,
    /// AVX-512 F and DQ, and FMA.
    Avx512,
}

/// The widest set of this processor, or a narrower one named by `PGRPO_SIMD` (`baseline`, `avx2`).
#[must_use]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let wanted = match std::env::var("PGRPO_SIMD").as_deref() {
            Ok("baseline") => Level::Baseline,
            Ok("avx2") => Level::Avx2,
            _ => Level::Avx512,
        };
        wanted.min(widest())
    })
}

#[cfg(target_arch = "x86_64")]
fn widest() -> Level {
    let avx512 = std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("fma");
    if avx512 {
        Level::Avx512
    } else if std::is_x86_feature_detected!("avx2") {
        Level::Avx2
    } else {
        Level::Baseline
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn widest() -> Level {
    Level::Baseline
}
