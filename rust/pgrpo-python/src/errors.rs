//! The exception classes, which Python owns, and which of them the core's errors become.

use pgrpo_core::Error;
use pyo3::prelude::*;

use crate::arrays::Grid;

pyo3::import_exception!(pgrpo.errors, CheckpointError);
pyo3::import_exception!(pgrpo.errors, ConfigError);
pyo3::import_exception!(pgrpo.errors, DataError);

pub(crate) fn to_python(error: Error) -> PyErr {
    to_python_of(error, None)
}

/// The error of a batch, whose entry is named as it lies in rows and columns if it has such.
pub(crate) fn to_python_of(error: Error, grid: Grid) -> PyErr {
    let mut message = error.to_string();
    let index = match error {
        Error::NonFinite { index, .. }
        | Error::NonFiniteOf { index, .. }
        | Error::Parents { index, .. }
        | Error::Weight { index, .. } => Some(index),
        _ => None,
    };
    if let (Some(index), Some([_, columns])) = (index, grid) {
        let place = format!("[{}, {}]", index / columns, index % columns);
        message = message.replacen(&format!("[{index}]"), &place, 1);
    }
    match error {
        Error::Option { .. } | Error::Unsupported { .. } => ConfigError::new_err(message),
        Error::Snapshot { .. } => CheckpointError::new_err(message),
        Error::Length { .. }
        | Error::Size { .. }
        | Error::Changed { .. }
        | Error::Parents { .. }
        | Error::GroupsRequired { .. }
        | Error::LengthsRequired { .. }
        | Error::NonFinite { .. }
        | Error::NonFiniteOf { .. }
        | Error::Weight { .. }
        | Error::Retract { .. }
        | Error::Full { .. }
        | Error::Damaged { .. } => DataError::new_err(message),
    }
}
