//! Snapshots as ids and columns, which state dictionaries are made of.

use numpy::{PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pgrpo_core::{AnyId, ClusterId, Entry, Moments, Snapshot};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict, PyList};

use crate::errors;

/// Columns of a cluster: count, origin, offset, m2; then three sums each of parts, baseline and
/// advantages.
const COLUMNS: usize = 13;

/// The id of a parent is in a dict, under this key.
const PARENT: &str = "parent";

/// Count, origin, offset and m2 of a history.
type History = (f64, f64, f64, f64);

/// Ids \[K\] and columns \[K, 13\] of all clusters; the same of what is pending; the history of all
/// clusters together, if it is kept; number of non-finite rewards.
pub(crate) type State<'py> = (
    Bound<'py, PyList>,
    Bound<'py, PyArray2<f64>>,
    Bound<'py, PyList>,
    Bound<'py, PyArray2<f64>>,
    History,
    u64,
);

pub(crate) fn to_python<'py>(py: Python<'py>, snapshot: &Snapshot) -> PyResult<State<'py>> {
    let (ids, columns) = table(py, &snapshot.clusters)?;
    let (pending_ids, pending) = table(py, &snapshot.pending)?;
    let Moments { count, origin, offset, m2 } = snapshot.pool;
    let pool = (count, origin, offset, m2);
    Ok((ids, columns, pending_ids, pending, pool, snapshot.num_nonfinite))
}

pub(crate) fn to_core(state: State<'_>) -> PyResult<Snapshot> {
    let (ids, columns, pending_ids, pending, pool, num_nonfinite) = state;
    let (count, origin, offset, m2) = pool;
    Ok(Snapshot {
        pool: Moments { count, origin, offset, m2 },
        clusters: entries(&ids, columns.readonly())?,
        pending: entries(&pending_ids, pending.readonly())?,
        num_nonfinite,
    })
}

fn table<'py>(
    py: Python<'py>,
    entries: &[Entry],
) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyArray2<f64>>)> {
    let ids = PyList::empty(py);
    let columns = PyArray2::<f64>::zeros(py, [entries.len(), COLUMNS], false);
    let mut rows = columns.readwrite();
    for (entry, row) in entries.iter().zip(rows.as_slice_mut()?.chunks_exact_mut(COLUMNS)) {
        match &entry.id {
            ClusterId::Int(id) => ids.append(id)?,
            ClusterId::Name(name) => ids.append(name)?,
            ClusterId::ParentInt(id) => ids.append([(PARENT, id)].into_py_dict(py)?)?,
            ClusterId::ParentName(name) => ids.append([(PARENT, name)].into_py_dict(py)?)?,
        }
        let Moments { count, origin, offset, m2 } = entry.rewards;
        let [parts, baseline, advantages] = [entry.parts, entry.baseline, entry.advantages];
        let rewards = [count, origin, offset, m2];
        let values = rewards.into_iter().chain(parts).chain(baseline).chain(advantages);
        for (place, value) in row.iter_mut().zip(values) {
            *place = value;
        }
    }
    drop(rows);
    Ok((ids, columns))
}

fn entries(ids: &Bound<'_, PyList>, columns: PyReadonlyArray2<'_, f64>) -> PyResult<Vec<Entry>> {
    if columns.shape() != [ids.len(), COLUMNS] {
        let message = format!(
            "normalizer state: columns have shape {:?}; expected ({}, {COLUMNS})",
            columns.shape(),
            ids.len()
        );
        return Err(errors::CheckpointError::new_err(message));
    }
    let rows = columns.as_slice()?.chunks_exact(COLUMNS);
    let entries = ids.iter().zip(rows).map(|(id, row)| {
        let parent = id.cast::<PyDict>().ok().map(|parent| parent.as_any().get_item(PARENT));
        let is_parent = parent.is_some();
        let id = parent.unwrap_or(Ok(id))?;
        let id = match id.extract() {
            Ok(id) => AnyId::Int(id),
            Err(_) => AnyId::Name(id.extract()?),
        };
        let id = ClusterId::from(if is_parent { id.as_parent() } else { id });
        let &[count, origin, offset, m2, ref sums @ ..] = row else {
            unreachable!("rows have {COLUMNS} columns");
        };
        Ok(Entry {
            id,
            rewards: Moments { count, origin, offset, m2 },
            parts: [sums[0], sums[1], sums[2]],
            baseline: [sums[3], sums[4], sums[5]],
            advantages: [sums[6], sums[7], sums[8]],
        })
    });
    entries.collect()
}
