//! A shared region behind a right header, with any bytes in the places of its parts, before it is opened
//! and between calls: errors and strange numbers, but no panic, no endless loop, nothing read outside.
#![no_main]

use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use pgrpo_core::shared::{Layout, Region};
use pgrpo_core::{AnyId, Batch, Ids, Normalizer, Options, RULES};

const AGREED: &str = "agreed";
const WORDS_PER_LINE: usize = 8;
const HEADER_WORDS: usize = 512;
/// Counters begin here; the words before say what the region is.
const COUNTERS_AT: usize = 448;
/// The keys of hashes, and the number made of them.
const HASH_KEYS_AT: usize = 6;

/// A cache line, so that a vector of them is aligned as mapped memory is.
#[derive(Default)]
#[repr(align(64))]
struct Line([AtomicU64; WORDS_PER_LINE]);

/// What a file would be.
struct Memory {
    lines: Vec<Line>,
    layout: Layout,
}

fuzz_target!(|bytes: &[u8]| {
    // Bytes that end too early are no case.
    let _ = play(&mut Unstructured::new(bytes));
});

fn play(bytes: &mut Unstructured) -> Result<()> {
    let options = Options {
        track_diagnostics: bytes.arbitrary()?,
        prior_count: if bytes.arbitrary()? { 4.0 } else { 0.0 },
        forgetting: if bytes.arbitrary()? { 0.5 } else { 1.0 },
        ..Options::new(*bytes.choose(&RULES)?)
    };
    let capacity = *bytes.choose(&[1, 8, 40])?;
    let layout = Layout::new(capacity, options.kept().num_streams()).expect("it is small");
    let memory = Memory::new(layout);
    for _ in 0..bytes.int_in_range(0..=16)? {
        memory.overwrite(bytes)?;
    }
    let mut normalizers = vec![memory.open(&options, bytes.arbitrary()?)];
    for _ in 0..40 {
        if bytes.is_empty() {
            break;
        }
        let normalizer = bytes.choose(&normalizers)?;
        // What is refused, and what comes of the rest, is as strange as the bytes.
        match bytes.int_in_range(0..=9)? {
            0 => drop(normalizer.restore(&source(&options, bytes)?.snapshot())),
            1 => drop(normalizer.merge(&source(&options, bytes)?.snapshot())),
            2 => drop(normalizer.snapshot().encode()),
            3 => drop(normalizer.alone().forget(any_ids(2, bytes)?)),
            4 => drop(normalizer.alone().keep(any_ids(2, bytes)?)),
            5 => memory.overwrite(bytes)?,
            // As if all others had been killed.
            6 => normalizers = vec![memory.open(&options, true)],
            7 if normalizers.len() < 3 => normalizers.push(memory.open(&options, false)),
            _ => call(normalizer, bytes)?,
        }
    }
    Ok(())
}

impl Memory {
    fn new(layout: Layout) -> Self {
        let mut lines = Vec::new();
        lines.resize_with(layout.length() / 64, Line::default);
        let memory = Self { lines, layout };
        for (at, bytes) in layout.header(AGREED).chunks_exact(8).enumerate() {
            memory
                .word(at)
                .store(u64::from_ne_bytes(bytes.try_into().expect("8")), Ordering::SeqCst);
        }
        // The same at each run, that what was found can be found again.
        for (at, word) in (HASH_KEYS_AT..).zip([1, 2, 1 ^ 2 << 32]) {
            memory.word(at).store(word, Ordering::SeqCst);
        }
        memory
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.lines[at / WORDS_PER_LINE].0[at % WORDS_PER_LINE]
    }

    fn length(&self) -> usize {
        self.lines.len() * 64
    }

    fn open(&self, options: &Options, alone: bool) -> Normalizer {
        let start = self.lines.as_ptr().cast_mut().cast();
        // SAFETY: aligned lines of atomics, which outlive all normalizers.
        let region = unsafe { Region::open(start, self.length(), self.layout, AGREED, alone) };
        Normalizer::shared(options.clone(), region.expect("the header is right"))
            .expect("the options are right")
    }

    /// Writes to a few words in a row, but not to those that say what the region is.
    fn overwrite(&self, bytes: &mut Unstructured) -> Result<()> {
        let (words, counters) = (self.length() / 8, HEADER_WORDS - COUNTERS_AT);
        // Most of a region are spare nodes, of which the first matter; what is behind them is the head
        // of their stack.
        let at = match bytes.int_in_range(0..=3)? {
            0 => COUNTERS_AT + bytes.int_in_range(0..=counters - 1)?,
            1 => words - 1 - bytes.int_in_range(0..=127)?,
            2 => HEADER_WORDS + bytes.int_in_range(0..=words - HEADER_WORDS - 1)?,
            _ => HEADER_WORDS + bytes.int_in_range(0..=4095)?,
        };
        for at in at..(at + bytes.int_in_range(1..=4)?).min(words) {
            let word = match bytes.int_in_range(0..=5)? {
                0 => bytes.arbitrary()?,
                1 => u64::MAX,
                2 => bytes.arbitrary::<u8>()?.into(),
                3 => u64::from(bytes.arbitrary::<u8>()?) << bytes.int_in_range(0..=63)?,
                4 => self.word(bytes.int_in_range(0..=words - 1)?).load(Ordering::SeqCst),
                _ => f64::from(bytes.arbitrary::<i8>()?).to_bits(),
            };
            self.word(at).store(word, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// A normalizer of this process's own that has seen something.
fn source(options: &Options, bytes: &mut Unstructured) -> Result<Normalizer> {
    let source = Normalizer::new(options.clone()).expect("the options are right");
    call(&source, bytes)?;
    Ok(source)
}

fn call(normalizer: &Normalizer, bytes: &mut Unstructured) -> Result<()> {
    let size = bytes.int_in_range(0..=8)?;
    let rewards = (0..size).map(|_| any_reward(bytes)).collect::<Result<Vec<f64>>>()?;
    let (clusters, groups) = (any_ids(size, bytes)?, any_ids(size, bytes)?);
    let batch =
        Batch { groups: Some(Ids::Any(&groups)), ..Batch::new(&rewards, Ids::Any(&clusters)) };
    let mut advantages = vec![0.0; size];
    // Errors are as welcome as numbers.
    drop(match bytes.int_in_range(0..=3)? {
        0 => normalizer.update(&batch),
        1 => normalizer.normalize(&batch, &mut advantages),
        2 => normalizer.retract(&batch),
        _ => normalizer.advantages(&batch, &mut advantages),
    });
    Ok(())
}

fn any_reward(bytes: &mut Unstructured) -> Result<f64> {
    Ok(f64::from(bytes.arbitrary::<i8>()?) / 4.0)
}

fn any_ids(size: usize, bytes: &mut Unstructured) -> Result<Vec<AnyId<'static>>> {
    const NAMES: [&str; 4] = ["", "a", "a name longer than a word", "größer"];
    let mut id = || {
        Ok(match bytes.int_in_range(0..=1)? {
            0 => AnyId::Name(bytes.choose(&NAMES)?),
            _ => AnyId::Int(i64::from(bytes.arbitrary::<u8>()?) - 8),
        })
    };
    (0..size).map(|_| id()).collect()
}
