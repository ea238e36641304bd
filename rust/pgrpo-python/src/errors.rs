//! The exception classes, which Python owns, and which of them the core's errors become.

use pgrpo_core::Error;
use pyo3::prelude::*;

pyo3::import_exception!(pgrpo.errors, CheckpointError);
pyo3::import_exception!(pgrpo.errors, ConfigError);
pyo3::import_exception!(pgrpo.errors, DataError);

pub(crate) fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Option { .. } | Error::Unsupported { .. } => ConfigError::new_err(message),
        Error::Snapshot { .. } => CheckpointError::new_err(message),
        Error::Length { .. }
        | Error::Size { .. }
        | Error::Changed { .. }
        | Error::GroupsRequired { .. }
        | Error::LengthsRequired { .. }
        | Error::NonFinite { .. }
        | Error::Weight { .. }
        | Error::Retract { .. }
        | Error::Full { .. }
        | Error::Damaged { .. } => DataError::new_err(message),
    }
}
