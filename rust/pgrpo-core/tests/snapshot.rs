//! Snapshots as bytes: exact both ways, and refused where anything about them is wrong.

use pgrpo_core::{ClusterId, Entry, Error, Moments, Snapshot};
use proptest::prelude::*;

/// CRC-64/XZ, bit by bit.
fn crc64(bytes: &[u8]) -> u64 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u64::from(byte), |crc: u64, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0xC96C_5795_D787_0F42 } else { 0 }
        })
    })
}

/// The bytes with a checksum that fits the rest of them.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - 8;
    let checksum = crc64(&bytes[..body]);
    bytes[body..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn with_word(bytes: &[u8], at: usize, word: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    sealed(bytes)
}

fn entry(id: ClusterId) -> Entry {
    Entry {
        id,
        rewards: Moments { count: 4.0, origin: 0.5, offset: -0.125, m2: 2.0 },
        parts: [2.0, 8.0, 1.5],
        baseline: [0.75, -0.25, 4.0],
        advantages: [4.0, -1.0, 3.0],
    }
}

fn name(name: &str) -> ClusterId {
    ClusterId::Name(name.to_owned())
}

fn small() -> Snapshot {
    Snapshot {
        clusters: vec![entry(name("für")), entry(ClusterId::Int(-7)), entry(name(""))],
        pending: vec![entry(ClusterId::Int(-7))],
        pool: Moments { count: 12.0, origin: 0.5, offset: -0.125, m2: 6.5 },
        num_nonfinite: 3,
    }
}

/// The reason for which bytes are refused.
fn refusal(bytes: &[u8]) -> String {
    match Snapshot::decode(bytes) {
        Err(Error::Snapshot { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

fn assert_refused(bytes: &[u8], reason: &str) {
    assert_eq!(refusal(bytes), reason);
}

fn ids() -> impl Strategy<Value = ClusterId> {
    let names = prop_oneof![
        any::<i64>().prop_map(ClusterId::Int),
        (-2_i64..9).prop_map(ClusterId::Int),
        prop::collection::vec(any::<char>(), 0..9)
            .prop_map(|chars| ClusterId::Name(chars.into_iter().collect())),
    ];
    (names, any::<bool>()).prop_map(
        |(id, is_parent)| {
            if is_parent { id.borrow().as_parent().into() } else { id }
        },
    )
}

/// Finite numbers of all magnitudes up to a bound, both zeros among them.
fn signed(bound: f64) -> impl Strategy<Value = f64> {
    use prop::num::f64::{NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    let numbers = POSITIVE | NEGATIVE | NORMAL | SUBNORMAL | ZERO;
    numbers.prop_map(move |number| if number.abs() < bound { number } else { bound / number })
}

fn at_least_0(bound: f64) -> impl Strategy<Value = f64> {
    signed(bound).prop_map(|number| if number < 0.0 { -number } else { number })
}

fn moments() -> impl Strategy<Value = Moments> {
    (at_least_0(9e15), signed(4e139), signed(4e139), at_least_0(1e300))
        .prop_map(|(count, origin, offset, m2)| Moments { count, origin, offset, m2 })
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let rewards = moments();
    let positive = || prop::array::uniform3(at_least_0(1e300));
    let mixed = || (at_least_0(1e300), signed(1e300), at_least_0(1e300)).prop_map(<[f64; 3]>::from);
    let rest = (rewards, positive(), mixed(), mixed());
    prop::collection::btree_map(ids(), rest, 0..20)
        .prop_map(|entries| {
            let entry = |(id, (rewards, parts, baseline, advantages))| Entry {
                id,
                rewards,
                parts,
                baseline,
                advantages,
            };
            entries.into_iter().map(entry).collect::<Vec<_>>()
        })
        .prop_shuffle()
}

fn snapshots() -> impl Strategy<Value = Snapshot> {
    (entries(), entries(), moments(), any::<u64>()).prop_map(
        |(clusters, pending, pool, num_nonfinite)| Snapshot {
            clusters,
            pending,
            pool,
            num_nonfinite,
        },
    )
}

proptest! {
    #[test]
    fn decoding_inverts_encoding(snapshot in snapshots()) {
        let bytes = snapshot.encode();
        let decoded = Snapshot::decode(&bytes).unwrap();
        // Equal bytes tell 0.0 from -0.0, which are equal numbers.
        prop_assert_eq!(decoded.encode(), bytes);
        prop_assert_eq!(decoded, snapshot);
    }

    #[test]
    fn bytes_are_refused_or_those_of_a_snapshot(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        Snapshot::decode(&bytes).unwrap_err();
        let mut changed = small().encode();
        for (at, byte) in changes {
            let at = at.index(changed.len());
            changed[at] = byte;
        }
        let changed = sealed(changed);
        if let Ok(snapshot) = Snapshot::decode(&changed) {
            prop_assert_eq!(snapshot.encode(), changed);
        }
    }
}

#[test]
fn bytes_are_laid_out_as_documented() {
    assert_eq!(crc64(b"123456789"), 0x995D_C9BB_DF19_39FA); // the check value of CRC-64/XZ
    let mut bytes = b"\x89pgrpo\r\n".to_vec();
    for word in [2_u64, 3, 3, 4, 1, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([12.0, 0.5, -0.125, 6.5_f64].iter().flat_map(|number| number.to_le_bytes()));
    let columns = [4.0, 0.5, -0.125, 2.0, 2.0, 8.0, 1.5, 0.75, -0.25, 4.0, 4.0, -1.0, 3.0_f64];
    bytes.extend(columns.iter().flat_map(|number| [number.to_le_bytes(); 3].concat()));
    bytes.extend([4_i64, -7, 0].iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend([1, 0, 1]);
    bytes.extend("für".as_bytes());
    bytes.extend(columns.iter().flat_map(|number| number.to_le_bytes()));
    bytes.extend((-7_i64).to_le_bytes());
    bytes.extend([0]);
    bytes.extend([0; 8]);
    assert_eq!(small().encode(), sealed(bytes));
    assert_eq!(Snapshot::default().encode().len(), 96);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small().encode();
    for length in 0..bytes.len() {
        let reason = refusal(&bytes[..length]);
        assert!(reason.starts_with("it is cut off"), "{length}: {reason}");
    }
    assert_refused(&bytes[..9], "it is cut off at 9 bytes; expected 96 or more");
    assert_refused(
        &bytes[..515],
        "it is cut off: it has 515 bytes; expected 552, for 3 clusters with names of 4 bytes, and 1 \
         with 0 pending",
    );
}

#[test]
fn every_flipped_bit_is_refused() {
    let bytes = small().encode();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        refusal(&flipped);
    }
}

#[test]
fn more_bytes_are_refused() {
    for extra in 1..20 {
        let mut bytes = small().encode();
        bytes.resize(552 + extra, 0);
        let reason = refusal(&sealed(bytes));
        let expected = format!("it goes on: it has {} bytes; expected 552, ", 552 + extra);
        assert!(reason.starts_with(&expected), "{reason}");
    }
}

#[test]
fn other_formats_and_versions_are_refused() {
    assert_refused(b"PK\x03\x04", r#"it starts with "PK\x03\x04"; expected "\x89pgrpo\r\n""#);
    // As text mode would leave it.
    assert_refused(
        b"\x89pgrpo\n\x01\0",
        r#"it starts with "\x89pgrpo\n\x01"; expected "\x89pgrpo\r\n""#,
    );
    let bytes = small().encode();
    assert_refused(&with_word(&bytes, 8, 3), "it is of version 3; expected 2");
    assert_refused(&with_word(&bytes, 8, 3)[..16], "it is of version 3; expected 2");
}

#[test]
fn sizes_are_not_believed() {
    let bytes = small().encode();
    for at in [24, 32, 40, 48] {
        for size in [u64::MAX, u64::MAX / 113, 1 << 63, 1 << 32, 5] {
            let reason = refusal(&with_word(&bytes, at, size));
            assert!(reason.starts_with("it is cut off: it has 552 bytes; expected "), "{reason}");
        }
    }
    // One entry less and its bytes as names: the length is right.
    let shifted = with_word(&with_word(&bytes, 24, 2), 32, 4 + 113);
    refusal(&shifted);
}

#[test]
fn bad_ids_are_refused() {
    let bytes = small().encode();
    let (words, kinds, names) = (400, 424, 427);
    assert_eq!(&bytes[kinds..names + 4], b"\x01\0\x01f\xC3\xBCr");
    let changed = |at: usize, byte: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        sealed(bytes)
    };
    assert_refused(&changed(kinds, 4), "the id of cluster 0 is of kind 4; expected 0 to 3");
    assert_refused(
        &with_word(&bytes, words, 5),
        "the name of cluster 0 is of 5 bytes; expected at most 4",
    );
    assert_refused(
        &with_word(&bytes, words, u64::MAX),
        "the name of cluster 0 is of 18446744073709551615 bytes; expected at most 4",
    );
    assert_refused(&changed(kinds, 0), "4 bytes follow the names; expected none");
    assert_refused(
        &changed(names + 1, 0xFF),
        "the name of cluster 0: invalid utf-8 sequence of 1 bytes from index 1",
    );
    assert_refused(
        &with_word(&bytes, words, 2),
        "the name of cluster 0: incomplete utf-8 byte sequence from index 1",
    );
}

#[test]
fn clusters_stand_there_once() {
    let twice = |id: &ClusterId| vec![entry(id.clone()), entry(name("b")), entry(id.clone())];
    for (id, shown) in [
        (ClusterId::Int(5), "5"),
        (name("a\n"), r#""a\n""#),
        (ClusterId::ParentInt(5), "5 (a parent)"),
        (ClusterId::ParentName("a".to_owned()), r#""a" (a parent)"#),
    ] {
        let reason = format!("cluster {shown} is there twice; expected once");
        let clusters = Snapshot { clusters: twice(&id), ..Snapshot::default() };
        assert_refused(&clusters.encode(), &reason);
        let pending = Snapshot { pending: twice(&id), ..Snapshot::default() };
        assert_refused(&pending.encode(), &reason);
    }
    let alike = Snapshot {
        clusters: [ClusterId::Int(5), name("5")]
            .into_iter()
            .flat_map(|id| [id.borrow().as_parent().into(), id])
            .map(entry)
            .collect(),
        ..Snapshot::default()
    };
    assert_eq!(Snapshot::decode(&alike.encode()), Ok(alike));
}

#[test]
fn impossible_numbers_are_refused() {
    type Field = fn(&mut Entry) -> &mut f64;
    let refuse = |field: Field, value: f64, reason: &str| {
        let mut snapshot = small();
        *field(&mut snapshot.pending[0]) = value;
        assert_refused(&snapshot.encode(), &format!("cluster -7 has {reason}: {value:?}"));
    };
    for count in
        [-1.0, -5e-324, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 9_007_199_254_740_994.0]
    {
        refuse(|entry| &mut entry.rewards.count, count, "a count outside of 0 to 2^53");
    }
    for mean in [f64::NAN, f64::INFINITY, -1e140, 1e200] {
        let expected = "that is not finite and below 1e140";
        refuse(|entry| &mut entry.rewards.origin, mean, &format!("an origin {expected}"));
        refuse(|entry| &mut entry.rewards.offset, mean, &format!("a mean {expected}"));
    }
    let snapshot = Snapshot { pool: Moments { m2: -1.0, ..small().pool }, ..small() };
    let reason = "the history of all clusters has an m2 outside of 0 to 1e300: -1.0";
    assert_refused(&snapshot.encode(), reason);
    let mut snapshot = small();
    (snapshot.clusters[1].rewards.origin, snapshot.clusters[1].rewards.offset) = (9e139, 9e139);
    let reason = "cluster -7 has a mean that is not finite and below 1e140: 1.8e140";
    assert_refused(&snapshot.encode(), reason);
    let fields: [(&str, bool, Field); 10] = [
        ("an m2", false, |entry| &mut entry.rewards.m2),
        ("parts[0]", false, |entry| &mut entry.parts[0]),
        ("parts[1]", false, |entry| &mut entry.parts[1]),
        ("parts[2]", false, |entry| &mut entry.parts[2]),
        ("baseline[0]", false, |entry| &mut entry.baseline[0]),
        ("baseline[1]", true, |entry| &mut entry.baseline[1]),
        ("baseline[2]", false, |entry| &mut entry.baseline[2]),
        ("advantages[0]", false, |entry| &mut entry.advantages[0]),
        ("advantages[1]", true, |entry| &mut entry.advantages[1]),
        ("advantages[2]", false, |entry| &mut entry.advantages[2]),
    ];
    for (name, signed, field) in fields {
        let least = if signed { "-1e300" } else { "0" };
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.1e300, -1.1e300] {
            refuse(field, value, &format!("{name} outside of {least} to 1e300"));
        }
        let mut snapshot = small();
        *field(&mut snapshot.pending[0]) = -1e-300;
        assert_eq!(Snapshot::decode(&snapshot.encode()).is_ok(), signed, "{name}");
    }
}
