//! What a normalizer remembers, as values and as bytes.
//!
//! The layout of the bytes is described in the project's `docs/snapshot.md`.

use std::collections::HashSet;

use crate::error::Error;
use crate::ids::ClusterId;
use crate::moments::{Moments, is_finite_reward};
use crate::state::Entry;

/// Everything a normalizer remembers, as plain values.
///
/// ```
/// use pgrpo_core::{Batch, Ids, Normalizer, Options, Rule, Snapshot};
///
/// let options = Options::new(Rule::named("pgrpo")?);
/// let normalizer = Normalizer::new(options.clone())?;
/// normalizer.update(&Batch::new(&[0.0, 1.0], Ids::I32(&[7, 7])))?;
/// let bytes = normalizer.snapshot().encode();
///
/// let restored = Normalizer::new(options)?;
/// restored.restore(&Snapshot::decode(&bytes)?)?;
/// assert_eq!(restored.snapshot(), normalizer.snapshot());
/// assert_eq!(restored.snapshot().clusters[0].rewards.mean(), 0.5);
/// # Ok::<(), pgrpo_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Clusters with a history, and their parents, whose ids are [such](ClusterId::is_parent).
    pub clusters: Vec<Entry>,
    /// What was folded since the last delta.
    pub pending: Vec<Entry>,
    /// History of all clusters together, in the sums that were kept of it; without any where it was not
    /// kept.
    pub pool: Moments,
    /// Non-finite rewards left out so far.
    pub num_nonfinite: u64,
}

/// Counts are exact up to here.
const MAX_COUNT: f64 = (1_u64 << 53) as f64;
/// The squares of 2^53 rewards sum up to less than 1e296. What was read can be added to for long
/// before it overflows.
const MAX_SUM: f64 = 1e300;

/// A line feed after a carriage return, and a byte that is not ASCII: whoever took the file for text
/// has changed its first bytes.
const MAGIC: [u8; 8] = *b"\x89pgrpo\r\n";
const VERSION: u64 = 2;
const WORD: usize = 8;
/// Magic, version, number of non-finite rewards; entries and bytes of names of either table; the four
/// numbers of the pool.
const HEADER: usize = 11 * WORD;
/// Numbers of an entry.
const COLUMNS: usize = 13;
/// Bytes of an entry beside its name: its numbers, its integer or length of name, and which of both.
const PER_ENTRY: usize = COLUMNS * WORD + WORD + 1;

const INT: u8 = 0;
const NAME: u8 = 1;
const PARENT_INT: u8 = 2;
const PARENT_NAME: u8 = 3;

/// Not above what sums may be.
fn positive(sum: f64) -> bool {
    (0.0..=MAX_SUM).contains(&sum)
}

type Check = (f64, bool, &'static str);

fn first_fault(checks: impl IntoIterator<Item = Check>) -> Option<(&'static str, f64)> {
    let fault = checks.into_iter().find(|&(_, passed, _)| !passed);
    fault.map(|(value, _, reason)| (reason, value))
}

/// What cannot be so in the moments of any rewards, and would spoil what they are merged with; and the
/// number that is so.
fn fault_of(rewards: &Moments) -> Option<(&'static str, f64)> {
    let Moments { count, origin, offset, m2 } = *rewards;
    let mean = origin + offset;
    first_fault([
        (count, (0.0..=MAX_COUNT).contains(&count), "has a count outside of 0 to 2^53"),
        (origin, is_finite_reward(origin), "has an origin that is not finite and below 1e140"),
        (mean, is_finite_reward(mean), "has a mean that is not finite and below 1e140"),
        (m2, positive(m2), "has an m2 outside of 0 to 1e300"),
    ])
}

impl<I> Entry<I> {
    /// The same of all its sums.
    fn fault(&self) -> Option<(&'static str, f64)> {
        let ([parts, squares, within], [xx, xy, yy]) = (self.parts, self.baseline);
        let [num_advantages, sum, sum_squares] = self.advantages;
        let signed = |sum: f64| sum.abs() <= MAX_SUM;
        let sums = [
            (parts, positive(parts), "has parts[0] outside of 0 to 1e300"),
            (squares, positive(squares), "has parts[1] outside of 0 to 1e300"),
            (within, positive(within), "has parts[2] outside of 0 to 1e300"),
            (xx, positive(xx), "has baseline[0] outside of 0 to 1e300"),
            (xy, signed(xy), "has baseline[1] outside of -1e300 to 1e300"),
            (yy, positive(yy), "has baseline[2] outside of 0 to 1e300"),
            (num_advantages, positive(num_advantages), "has advantages[0] outside of 0 to 1e300"),
            (sum, signed(sum), "has advantages[1] outside of -1e300 to 1e300"),
            (sum_squares, positive(sum_squares), "has advantages[2] outside of 0 to 1e300"),
        ];
        fault_of(&self.rewards).or_else(|| first_fault(sums))
    }
}

impl Entry {
    fn numbers(&self) -> [f64; COLUMNS] {
        let Moments { count, origin, offset, m2 } = self.rewards;
        let ([p0, p1, p2], [r0, r1, r2]) = (self.parts, self.baseline);
        let [a0, a1, a2] = self.advantages;
        [count, origin, offset, m2, p0, p1, p2, r0, r1, r2, a0, a1, a2]
    }

    fn from_numbers(id: ClusterId, numbers: [f64; COLUMNS]) -> Self {
        let [count, origin, offset, m2, p0, p1, p2, r0, r1, r2, a0, a1, a2] = numbers;
        Self {
            id,
            rewards: Moments { count, origin, offset, m2 },
            parts: [p0, p1, p2],
            baseline: [r0, r1, r2],
            advantages: [a0, a1, a2],
        }
    }
}

impl Snapshot {
    /// Refuses clusters that stand there twice, and what cannot be the sums of any rewards.
    ///
    /// # Errors
    /// [`Error::Snapshot`] names the cluster and what is wrong with it.
    pub fn check(&self) -> Result<(), Error> {
        if let Some((reason, value)) = fault_of(&self.pool) {
            return Err(refused(format!("the history of all clusters {reason}: {value:?}")));
        }
        for entries in [&self.clusters, &self.pending] {
            let mut seen = HashSet::with_capacity(entries.len());
            for entry in entries {
                if let Some((reason, value)) = entry.fault() {
                    return Err(refused(format!("cluster {} {reason}: {value:?}", entry.id)));
                }
                if !seen.insert(&entry.id) {
                    let reason = format!("cluster {} is there twice; expected once", entry.id);
                    return Err(refused(reason));
                }
            }
        }
        Ok(())
    }

    /// The history of all its clusters together, worked out from them.
    pub(crate) fn pooled(&self) -> Moments {
        let clusters = self.clusters.iter().filter(|entry| !entry.id.is_parent());
        clusters.map(|entry| entry.rewards).fold(Moments::default(), Moments::merge)
    }

    /// The snapshot as bytes, which [`decode`](Self::decode) turns into the same, bit for bit.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let tables = [&self.clusters, &self.pending];
        let names = tables.map(|entries| entries.iter().map(|entry| name(&entry.id).len()).sum());
        let sizes: [usize; 4] = [tables[0].len(), names[0], tables[1].len(), names[1]];
        let size = HEADER + PER_ENTRY * (sizes[0] + sizes[2]) + sizes[1] + sizes[3] + WORD;
        let mut bytes = Vec::with_capacity(size);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.num_nonfinite.to_le_bytes());
        bytes.extend(sizes.iter().flat_map(|&size| (size as u64).to_le_bytes()));
        let Moments { count, origin, offset, m2 } = self.pool;
        bytes.extend([count, origin, offset, m2].into_iter().flat_map(f64::to_le_bytes));
        for entries in tables {
            encode_table(entries, &mut bytes);
        }
        bytes.extend(crc64(&bytes).to_le_bytes());
        bytes
    }

    /// The snapshot that [`encode`](Self::encode) made these bytes of.
    ///
    /// Takes memory in proportion to the number of bytes, whatever they say.
    ///
    /// # Errors
    /// [`Error::Snapshot`] where the bytes are of something else or of another version, cut off,
    /// longer or damaged, or hold what [`check`](Self::check) refuses.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let start = &bytes[..bytes.len().min(MAGIC.len())];
        if !MAGIC.starts_with(start) {
            let (start, magic) = (start.escape_ascii(), MAGIC.escape_ascii());
            return Err(refused(format!("it starts with \"{start}\"; expected \"{magic}\"")));
        }
        let length = bytes.len();
        if length >= 2 * WORD && word(bytes, 1) != VERSION {
            let version = word(bytes, 1);
            return Err(refused(format!("it is of version {version}; expected {VERSION}")));
        }
        let least = HEADER + WORD;
        if length < least {
            return Err(refused(format!(
                "it is cut off at {length} bytes; expected {least} or more"
            )));
        }
        let [num_clusters, cluster_names, num_pending, pending_names] =
            std::array::from_fn(|size| word(bytes, 3 + size));
        // Cannot overflow: sums of a few products of 64 and 7 bits.
        let table = |entries, names| u128::from(entries) * PER_ENTRY as u128 + u128::from(names);
        let expected =
            least as u128 + table(num_clusters, cluster_names) + table(num_pending, pending_names);
        if length as u128 != expected {
            let what = if (length as u128) < expected { "is cut off" } else { "goes on" };
            return Err(refused(format!(
                "it {what}: it has {length} bytes; expected {expected}, for {num_clusters} clusters \
                 with names of {cluster_names} bytes, and {num_pending} with {pending_names} pending"
            )));
        }
        let (body, checksum) = bytes.split_at(length - WORD);
        let (found, stored) = (crc64(body), word(checksum, 0));
        if found != stored {
            return Err(refused(format!(
                "it is damaged: its checksum is {found:016x}; expected {stored:016x}"
            )));
        }
        let mut rest = &body[HEADER..];
        let [count, origin, offset, m2] = [7, 8, 9, 10].map(|at| f64::from_bits(word(body, at)));
        let snapshot = Self {
            pool: Moments { count, origin, offset, m2 },
            clusters: decode_table(&mut rest, num_clusters, cluster_names)?,
            pending: decode_table(&mut rest, num_pending, pending_names)?,
            num_nonfinite: word(bytes, 2),
        };
        snapshot.check()?;
        Ok(snapshot)
    }
}

fn refused(reason: String) -> Error {
    Error::Snapshot { reason }
}

/// The bytes that an id needs beside its word.
fn name(id: &ClusterId) -> &str {
    match id {
        ClusterId::Int(_) | ClusterId::ParentInt(_) => "",
        ClusterId::Name(name) | ClusterId::ParentName(name) => name,
    }
}

/// Columns of numbers, then of words, then of kinds, then the names.
fn encode_table(entries: &[Entry], bytes: &mut Vec<u8>) {
    let start = bytes.len();
    bytes.resize(start + COLUMNS * WORD * entries.len(), 0);
    let columns = &mut bytes[start..];
    for (row, entry) in entries.iter().enumerate() {
        for (column, number) in entry.numbers().into_iter().enumerate() {
            let at = (column * entries.len() + row) * WORD;
            columns[at..at + WORD].copy_from_slice(&number.to_le_bytes());
        }
    }
    bytes.extend(entries.iter().flat_map(|entry| match &entry.id {
        ClusterId::Int(id) | ClusterId::ParentInt(id) => id.to_le_bytes(),
        ClusterId::Name(name) | ClusterId::ParentName(name) => (name.len() as u64).to_le_bytes(),
    }));
    bytes.extend(entries.iter().map(|entry| match entry.id {
        ClusterId::Int(_) => INT,
        ClusterId::Name(_) => NAME,
        ClusterId::ParentInt(_) => PARENT_INT,
        ClusterId::ParentName(_) => PARENT_NAME,
    }));
    for entry in entries {
        bytes.extend(name(&entry.id).as_bytes());
    }
}

/// Takes a table, of which there is as much as its sizes say, off the front of `rest`.
fn decode_table(rest: &mut &[u8], num_entries: u64, names: u64) -> Result<Vec<Entry>, Error> {
    let size = |size| usize::try_from(size).expect("no more than there are bytes");
    let (num_entries, names) = (size(num_entries), size(names));
    let mut take = |size: usize| rest.split_off(..size).expect("no more than there are bytes");
    let columns = take(COLUMNS * WORD * num_entries);
    let words = take(WORD * num_entries);
    let kinds = take(num_entries);
    let mut names = take(names);
    let mut entries = Vec::with_capacity(num_entries);
    for (row, &kind) in kinds.iter().enumerate() {
        let value = word(words, row);
        let id = match kind {
            INT => ClusterId::Int(value.cast_signed()),
            PARENT_INT => ClusterId::ParentInt(value.cast_signed()),
            NAME | PARENT_NAME => {
                let length = usize::try_from(value).unwrap_or(usize::MAX);
                let Some(name) = names.split_off(..length) else {
                    return Err(refused(format!(
                        "the name of cluster {row} is of {value} bytes; expected at most {}",
                        names.len()
                    )));
                };
                let name = str::from_utf8(name)
                    .map_err(|error| refused(format!("the name of cluster {row}: {error}")))?;
                let make = if kind == NAME { ClusterId::Name } else { ClusterId::ParentName };
                make(name.to_owned())
            }
            kind => {
                return Err(refused(format!(
                    "the id of cluster {row} is of kind {kind}; expected {INT} to {PARENT_NAME}"
                )));
            }
        };
        let number = |column| f64::from_bits(word(columns, column * num_entries + row));
        entries.push(Entry::from_numbers(id, std::array::from_fn(number)));
    }
    if names.is_empty() {
        Ok(entries)
    } else {
        let left = names.len();
        Err(refused(format!("{left} bytes follow the names; expected none")))
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let bytes = &bytes[at * WORD..(at + 1) * WORD];
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

/// The polynomial of ECMA-182, its bits reversed.
const POLYNOMIAL: u64 = 0xC96C_5795_D787_0F42;

/// `TABLES[k][byte]`: what a byte adds to the checksum when k more bytes follow.
static TABLES: [[u64; 256]; WORD] = {
    let mut tables = [[0; 256]; WORD];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut following = 1;
    while following < WORD {
        let mut byte = 0;
        while byte < 256 {
            let crc = tables[following - 1][byte];
            tables[following][byte] = (crc >> 8) ^ tables[0][(crc & 0xFF) as usize];
            byte += 1;
        }
        following += 1;
    }
    tables
};

/// CRC-64/XZ, eight bytes at a time: it notices every change within 64 bits in a row.
fn crc64(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<WORD>();
    let crc = words.iter().fold(u64::MAX, |crc, word| {
        let mixed = (crc ^ u64::from_le_bytes(*word)).to_le_bytes();
        mixed
            .iter()
            .zip(TABLES.iter().rev())
            .fold(0, |crc, (&byte, table)| crc ^ table[byte as usize])
    });
    let crc = rest
        .iter()
        .fold(crc, |crc, &byte| TABLES[0][(crc.to_le_bytes()[0] ^ byte) as usize] ^ (crc >> 8));
    !crc
}
