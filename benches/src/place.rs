//! Files of a stage and a volume, and an engine on them.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::bytes::gate::{Access, Gate};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};
use tidegate_driver::io::file::FileDisk;
use tidegate_driver::volume::admin::{self, NewVolume, StageOptions};
use tidegate_driver::volume::{Engine, EngineConfig};

/// The only volume.
pub const VOLUME: VolumeId = VolumeId(1);

/// A folder with a stage and the backing of a volume, which goes away with the value.
#[derive(Debug)]
pub struct Place {
    dir: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn io(e: std::io::Error) -> Error {
    Error::io("cannot prepare the files", e)
}

impl Place {
    /// A stage and a sparse backing in a new folder `name` of `dir`. `filled`: every block of the stage is there, so that
    /// no write allocates.
    pub fn new(
        dir: &Path,
        name: &str,
        stage_bytes: u64,
        volume_bytes: u64,
        ack: AckLevel,
        filled: bool,
    ) -> Result<Place> {
        let place = Place { dir: dir.join(format!("{name}-{}", std::process::id())) };
        std::fs::create_dir_all(&place.dir).map_err(io)?;
        if filled {
            filled_file(&place.dir.join("stage"), stage_bytes).map_err(io)?;
        } else {
            File::create(place.dir.join("stage")).and_then(|f| f.set_len(stage_bytes)).map_err(io)?;
        }
        let backing = File::create(place.dir.join("backing"));
        backing.and_then(|f| f.set_len(volume_bytes + (64 << 10))).map_err(io)?;
        let stage = FileDisk::open_exclusive(&place.dir.join("stage"))?;
        let backing = FileDisk::open_exclusive(&place.dir.join("backing"))?;
        admin::create_stage(&stage, StageOptions::for_disk(&stage))?;
        let new = NewVolume {
            name: "bench".into(),
            size_bytes: volume_bytes,
            block_bytes: 512,
            ack,
            on_log_error: OnLogError::Stall,
            backing: String::new(),
        };
        admin::add_volume(&stage, &backing, new)?;
        Ok(place)
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// An engine on it. Its arena is in `arena_dir`, or beside the stage.
    pub fn open(&self, arena_dir: Option<&Path>) -> Result<Arc<Engine>> {
        engine_on(&self.dir, arena_dir.unwrap_or(&self.dir.join("arena")))
    }

    /// An engine, and a byte device of its volume.
    pub fn serve(&self) -> Result<Served> {
        let arena_dir = PathBuf::from(format!("/dev/shm/tidegate-bench-{}", std::process::id()));
        let engine = self.open(Some(&arena_dir))?;
        let socket = self.dir.join("socket");
        let gate = Gate::open(engine.clone(), Arc::default(), VOLUME, &socket, Access::default())?;
        Ok(Served { gate: Some(gate), engine, socket, arena_dir })
    }

    /// A copy of the files, which nobody has open, in a folder beside, whose name ends in `which`.
    pub fn copy(&self, which: &str) -> Result<Place> {
        let mut name = self.dir.file_name().unwrap_or_default().to_owned();
        name.push(which);
        let place = Place { dir: self.dir.with_file_name(name) };
        std::fs::create_dir_all(&place.dir).map_err(io)?;
        let files = [self.dir.join("stage"), self.dir.join("backing")];
        // The backing is nearly all hole.
        let status =
            std::process::Command::new("cp").arg("--sparse=always").args(files).arg(&place.dir).status();
        match status.map_err(io)?.success() {
            true => Ok(place),
            false => Err(Error::new(ErrorKind::Io, "cannot copy the files")),
        }
    }
}

/// An engine on the files of a place in folder `dir`.
pub fn engine_on(dir: &Path, arena_dir: &Path) -> Result<Arc<Engine>> {
    Engine::open(EngineConfig {
        stage: Arc::new(FileDisk::open_exclusive(&dir.join("stage"))?),
        backings: vec![(VOLUME, Arc::new(FileDisk::open_exclusive(&dir.join("backing"))?))],
        arena_dir: arena_dir.to_owned(),
        accept_loss: true,
        forget: None,
    })
}

/// A byte device that is served.
pub struct Served {
    gate: Option<Gate>,
    /// What serves it.
    pub engine: Arc<Engine>,
    /// Where clients come in.
    pub socket: PathBuf,
    arena_dir: PathBuf,
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.gate.take());
        let _ = self.engine.close(true);
        let _ = std::fs::remove_dir_all(&self.arena_dir);
    }
}

/// A file whose blocks are all there, so that no write allocates.
pub fn filled_file(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let zeroes = vec![0; 4 << 20];
    for _ in 0..bytes.div_ceil(zeroes.len() as u64) {
        file.write_all(&zeroes)?;
    }
    file.set_len(bytes)?;
    file.sync_all()
}
