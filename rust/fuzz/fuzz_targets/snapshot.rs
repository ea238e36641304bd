//! Any bytes, read as a snapshot: refused, or exactly those of the snapshot they make.
#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use pgrpo_core::{ClusterId, Entry, Moments, Snapshot};

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    check(&sealed(bytes));
    // Read as instructions for one, they get past the sizes as well.
    if let Ok(snapshot) = any_snapshot(&mut Unstructured::new(bytes)) {
        let decoded = Snapshot::decode(&snapshot.encode());
        assert_eq!(decoded.is_ok(), snapshot.check().is_ok(), "{decoded:?}");
        if let Ok(decoded) = decoded {
            assert_eq!(decoded.encode(), snapshot.encode());
            assert_eq!(decoded, snapshot);
        }
    }
});

fn check(bytes: &[u8]) {
    if let Ok(snapshot) = Snapshot::decode(bytes) {
        assert_eq!(snapshot.encode(), bytes);
    }
}

/// The bytes with a checksum (CRC-64/XZ) that fits the rest of them.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let body = &bytes[..bytes.len().saturating_sub(8)];
    let crc = body.iter().fold(u64::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u64::from(byte), |crc: u64, _| {
            (crc >> 1) ^ (0xC96C_5795_D787_0F42 & (crc & 1).wrapping_neg())
        })
    });
    [body, &(!crc).to_le_bytes()].concat()
}

fn any_snapshot(bytes: &mut Unstructured) -> Result<Snapshot> {
    Ok(Snapshot {
        clusters: any_entries(bytes)?,
        pending: any_entries(bytes)?,
        pool: any_history(bytes)?,
        num_nonfinite: bytes.arbitrary()?,
    })
}

fn any_entries(bytes: &mut Unstructured) -> Result<Vec<Entry>> {
    (0..bytes.int_in_range(0..=3)?).map(|_| any_entry(bytes)).collect()
}

fn any_entry(bytes: &mut Unstructured) -> Result<Entry> {
    let id = match bytes.int_in_range(0..=4)? {
        3 => ClusterId::ParentInt(bytes.arbitrary()?),
        4 => ClusterId::ParentName(bytes.arbitrary()?),
        0 => ClusterId::Int(bytes.arbitrary::<i8>()?.into()),
        1 => ClusterId::Int(bytes.arbitrary()?),
        _ => ClusterId::Name(bytes.arbitrary()?),
    };
    let rewards = any_history(bytes)?;
    let mut triple = || Ok([any_number(bytes)?, any_number(bytes)?, any_number(bytes)?]);
    let (parts, baseline, advantages) = (triple()?, triple()?, triple()?);
    Ok(Entry { id, rewards, parts, baseline, advantages })
}

fn any_history(bytes: &mut Unstructured) -> Result<Moments> {
    let mut number = || any_number(bytes);
    Ok(Moments { count: number()?, origin: number()?, offset: number()?, m2: number()? })
}

fn any_number(bytes: &mut Unstructured) -> Result<f64> {
    match bytes.int_in_range(0..=3)? {
        0 => bytes.arbitrary(),
        _ => Ok(f64::from(bytes.arbitrary::<i8>()?)),
    }
}
