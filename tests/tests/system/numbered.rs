//! Writes with a number in every sector: what a device holds tells which write put it there, and whether the whole is
//! what the first N writes in order have made.

use std::path::Path;

use tidegate_driver::io::file::{Access, Lock};
use tidegate_driver::io::{Disk, FileDisk};

const SECTOR: usize = 512;

/// Random numbers, the same each time.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// A write of whole sectors to one of several volumes.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub volume: usize,
    pub sector: u64,
    pub count: u64,
}

/// The writes made so far; the first has number 1.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub writes: Vec<Write>,
}

fn fill(sector: &mut [u8], number: u64, position: u64) {
    for (word, bytes) in sector.chunks_exact_mut(8).enumerate() {
        let value = match word {
            0 => number,
            1 => position,
            _ => number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (position << 7) ^ word as u64,
        };
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

/// What write `number` puts into `count` sectors from `sector`.
pub fn content(number: u64, sector: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; count as usize * SECTOR];
    for (i, one) in bytes.chunks_exact_mut(SECTOR).enumerate() {
        fill(one, number, sector + i as u64);
    }
    bytes
}

/// Number of the write that each sector comes from, 0 for zeroes. A sector that is no write's is an error.
pub fn numbers_in(bytes: &[u8]) -> Result<Vec<u64>, String> {
    let mut expected = [0; SECTOR];
    bytes
        .chunks_exact(SECTOR)
        .enumerate()
        .map(|(position, sector)| {
            let number = u64::from_le_bytes(sector[..8].try_into().unwrap());
            expected.fill(0);
            if number != 0 {
                fill(&mut expected, number, position as u64);
            }
            if *sector == expected {
                Ok(number)
            } else {
                Err(format!("sector {position} is not what write {number} put there, nor any other"))
            }
        })
        .collect()
}

impl History {
    /// Chooses the next write and enters it; its number and bytes. `small`: at most 8 KiB.
    pub fn next(
        &mut self,
        random: &mut Random,
        volumes: usize,
        sectors: u64,
        small: bool,
    ) -> (u64, Write, Vec<u8>) {
        let count = match random.below(10) {
            _ if small => 1 + random.below(16),
            0..=5 => 1 + random.below(16),
            6..=8 => 8 + random.below(56),
            _ => 128 + random.below(384),
        };
        let write = Write {
            volume: random.below(volumes as u64) as usize,
            sector: random.below(sectors - count),
            count,
        };
        self.writes.push(write);
        let number = self.writes.len() as u64;
        (number, write, content(number, write.sector, write.count))
    }

    /// What the first `upto` writes leave on `volume`.
    pub fn numbers_after(&self, upto: u64, volume: usize, sectors: u64) -> Vec<u64> {
        let mut numbers = vec![0; sectors as usize];
        for (i, w) in self.writes[..upto as usize].iter().enumerate().filter(|(_, w)| w.volume == volume) {
            numbers[w.sector as usize..(w.sector + w.count) as usize].fill(i as u64 + 1);
        }
        numbers
    }

    /// The volumes hold what the first N writes have made, for some N, which is returned. It can only be the largest
    /// number that is found: a later write would show.
    pub fn prefix_in(&self, volumes: &[Vec<u8>]) -> Result<u64, String> {
        let found = volumes.iter().map(|v| numbers_in(v)).collect::<Result<Vec<_>, _>>()?;
        let last = found.iter().flatten().copied().max().unwrap_or(0);
        if last > self.writes.len() as u64 {
            return Err(format!("write {last} was never made"));
        }
        for (volume, numbers) in found.iter().enumerate() {
            let expected = self.numbers_after(last, volume, numbers.len() as u64);
            if let Some(at) = (0..expected.len()).find(|&i| expected[i] != numbers[i]) {
                return Err(format!(
                    "write {last} is there, but sector {at} of volume {volume} is from write {} instead of {}",
                    numbers[at], expected[at]
                ));
            }
        }
        Ok(last)
    }
}

/// Opens a device or file beside others that use it.
pub fn open(path: &str) -> FileDisk {
    FileDisk::open(Path::new(path), Access::ReadWrite, Lock::None).unwrap()
}

/// The first `sectors` sectors of a device or file, not from the page cache.
pub fn read(path: &str, sectors: u64) -> Vec<u8> {
    let disk = FileDisk::open_to_look(Path::new(path)).unwrap();
    let mut bytes = vec![0; sectors as usize * SECTOR];
    for (i, part) in bytes.chunks_mut(1 << 20).enumerate() {
        disk.read((i as u64) << 20, part).unwrap_or_else(|e| panic!("{}", e.report()));
    }
    bytes
}

/// A device and the writes made to it.
pub struct Writer {
    disk: Option<FileDisk>,
    pub history: History,
    random: Random,
    sectors: u64,
}

impl Writer {
    /// Writer to the first `sectors` sectors of `path`.
    pub fn new(path: &str, sectors: u64) -> Writer {
        Writer { disk: Some(open(path)), history: History::default(), random: Random::new(sectors), sectors }
    }

    /// One write; its number if it was acknowledged.
    pub fn write(&mut self) -> Result<u64, String> {
        let (number, write, bytes) = self.history.next(&mut self.random, 1, self.sectors, true);
        self.put(write, &bytes)?;
        Ok(number)
    }

    fn put(&self, write: Write, bytes: &[u8]) -> Result<(), String> {
        let disk = self.disk.as_ref().expect("the device is open");
        disk.write(write.sector * SECTOR as u64, bytes).map_err(|e| e.report())
    }

    /// Repeats the last write, which failed.
    pub fn again(&self) {
        let (number, write) = (self.history.writes.len() as u64, *self.history.writes.last().unwrap());
        self.put(write, &content(number, write.sector, write.count)).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Makes everything written durable.
    pub fn sync(&self) {
        self.disk.as_ref().expect("the device is open").sync().unwrap_or_else(|e| panic!("{}", e.report()));
    }

    /// Lets go of the device.
    pub fn closed(self) -> Writer {
        Writer { disk: None, ..self }
    }

    /// Goes on with a device.
    pub fn reopened(self, path: &str) -> Writer {
        Writer { disk: Some(open(path)), ..self }
    }

    /// `count` writes, all acknowledged.
    pub fn write_many(&mut self, count: usize) {
        for _ in 0..count {
            self.write().unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// `path` holds exactly what was written.
    pub fn verify(&self, path: &str) {
        let found =
            self.history.prefix_in(&[read(path, self.sectors)]).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(found, self.history.writes.len() as u64, "{path}: not all writes are there");
    }
}
