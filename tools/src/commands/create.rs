//! `create`: every check first, then files, stage, volume, and the name last. What fails is undone.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;
use tidegate_driver::base::limits::VOLUMES_MAX;
use tidegate_driver::base::units::align_down;
use tidegate_driver::base::{Error, ErrorKind, Result, VolumeId};
use tidegate_driver::format::geometry::Geometry;
use tidegate_driver::format::label::{backing_bytes_for, volume_bytes_for};
use tidegate_driver::format::superblock::Superblock;
use tidegate_driver::format::volume_entry::{VolumeInfo, check_name};
use tidegate_driver::io::file::{Fill, Identity, create_file, overlap};
use tidegate_driver::io::probe::{Content, Finding, label_at, probe, refuse_content};
use tidegate_driver::io::{Disk, FileDisk};
use uuid::Uuid;

use crate::cli::Create;
use crate::client::Client;
use crate::engine::{self, NewVolume, StageOptions};
use crate::paths;
use crate::protocol::{Reply, Request};
use crate::registry::{Entry, Registry};
use crate::report;
use crate::signals::Signals;
use crate::size::human;
use crate::stacking;

const STAGE_BYTES_DEFAULT: u64 = 1 << 30;
/// Zeroed at either end of a device that held something else, so that nobody recognises it any more.
const WIPE_BYTES: u64 = 1 << 20;

/// What will be the stage.
enum Stage {
    /// A file to be made.
    Missing { bytes: u64 },
    /// A device to be formatted; `wipe`: it holds something else.
    Blank { disk: FileDisk, wipe: bool },
    /// A stage without a server.
    Offline { disk: FileDisk, superblock: Box<Superblock> },
    /// A stage with a server.
    Online { client: Client, superblock: Box<Superblock> },
}

/// What will be the backing.
enum Backing {
    /// A file to be made.
    Missing,
    /// A device.
    Present(FileDisk),
}

/// `create`.
pub fn run(registry: &Registry, args: &Create) -> Result<ExitCode> {
    let (entry, size_bytes) = create(registry, args)?;
    if args.json {
        report::json(&json!({
            "name": entry.name,
            "uuid": entry.volume_uuid,
            "size_bytes": size_bytes,
            "stage": entry.stage,
            "stage_uuid": entry.stage_uuid,
            "backing": entry.backing,
        }))?;
    } else {
        report::line(format!(
            "created volume '{}' of {}: `tidegate attach {}` makes its device",
            entry.name,
            human(size_bytes),
            entry.name
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Creates the volume; its entry and size.
pub fn create(registry: &Registry, args: &Create) -> Result<(Entry, u64)> {
    check_name(&args.name)?;
    let stage_path = paths::absolute(&args.stage)?;
    let backing_path = paths::absolute(&args.backing)?;
    if let Some(size) = args.size {
        // Said before anything is opened: it needs nothing but the arguments.
        volume_info(args, size.0, &backing_path).validate()?;
    }
    check_separate(&stage_path, &backing_path)?;
    let _lock = registry.lock()?;
    check_free(registry, &args.name, &stage_path, &backing_path)?;
    let signals = Signals::block()?;
    let outcome = checked(registry, args, &stage_path, &backing_path).and_then(|(stage, backing, info)| {
        let work = Work { registry, signals: &signals, stage_path: &stage_path, backing_path: &backing_path };
        work.carry_out(stage, backing, &info)
    });
    signals.release();
    outcome
}

fn volume_info(args: &Create, size_bytes: u64, backing: &Path) -> VolumeInfo {
    VolumeInfo {
        uuid: Uuid::nil(),
        name: args.name.clone(),
        id: VolumeId(0),
        size_bytes,
        block_bytes: args.block_size,
        ack: args.ack.into(),
        on_log_error: args.on_log_error.into(),
        created_ns: 0,
        backing: backing.display().to_string(),
    }
}

/// All checks; opens, and so locks, what exists.
fn checked(
    registry: &Registry,
    args: &Create,
    stage_path: &Path,
    backing_path: &Path,
) -> Result<(Stage, Backing, VolumeInfo)> {
    let (backing, size_bytes) = check_backing(args, backing_path)?;
    let info = volume_info(args, size_bytes, backing_path);
    info.validate()?;
    let stage = check_stage(registry, args, stage_path)?;
    if let Stage::Offline { superblock, .. } | Stage::Online { superblock, .. } = &stage {
        check_room(superblock, stage_path, &args.name)?;
        let others: Vec<_> = superblock.volumes.iter().map(|v| (v.name.clone(), v.uuid)).collect();
        stacking::refuse(&others, &[stage_path, backing_path])?;
    }
    Ok((stage, backing, info))
}

fn same(stage: &Path, backing: &Path) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!(
            "stage {} and backing {} are the same thing, or one is part of the other: use two devices or files",
            stage.display(),
            backing.display()
        ),
    )
}

fn check_separate(stage: &Path, backing: &Path) -> Result<()> {
    let (stage_exists, backing_exists) = (paths::exists(stage)?, paths::exists(backing)?);
    if stage == backing {
        return Err(same(stage, backing));
    }
    if stage_exists && backing_exists && overlap(Identity::of_path(stage)?, Identity::of_path(backing)?) {
        return Err(same(stage, backing));
    }
    Ok(())
}

/// The name is free, and neither device is another volume's.
fn check_free(registry: &Registry, name: &str, stage: &Path, backing: &Path) -> Result<()> {
    let taken = |what: String| Err(Error::new(ErrorKind::Exists, what));
    if let Some(entry) = registry.find(name)? {
        return taken(format!(
            "there is a volume '{name}' already (stage {}, backing {}): use another name or `tidegate delete {name}` first",
            entry.stage.display(),
            entry.backing.display()
        ));
    }
    let identity = |path: &Path| Identity::of_path(path).ok();
    let (stage_id, backing_id) = (identity(stage), identity(backing));
    for other in registry.entries()? {
        let clash = |id: Option<Identity>, path: &Path| {
            id.is_some_and(|id| identity(path).is_some_and(|o| overlap(id, o)))
        };
        if clash(backing_id, &other.backing) || clash(backing_id, &other.stage) {
            return taken(format!(
                "{} belongs to volume '{}': use another backing",
                backing.display(),
                other.name
            ));
        }
        if clash(stage_id, &other.backing) {
            return taken(format!(
                "{} is the backing of volume '{}': use another stage",
                stage.display(),
                other.name
            ));
        }
    }
    Ok(())
}

fn check_backing(args: &Create, path: &Path) -> Result<(Backing, u64)> {
    if !paths::exists(path)? {
        let size = args.size.ok_or_else(|| {
            let what = format!(
                "{} does not exist: say with --size how large a file to make, or correct the path",
                path.display()
            );
            Error::new(ErrorKind::Invalid, what)
        })?;
        return Ok((Backing::Missing, size.0));
    }
    let disk = FileDisk::open_exclusive(path).map_err(|e| e.within("backing"))?;
    let most = align_down(volume_bytes_for(disk.len_bytes()), u64::from(args.block_size.next_power_of_two()));
    let size = args.size.map_or(most, |s| s.0);
    if size == 0 || size > most {
        let needed = backing_bytes_for(size.max(u64::from(args.block_size)));
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "backing {} of {} bytes is too small for a volume of {size} bytes, which needs {needed} (64 KiB more than \
                 its size); the largest volume here has {most} bytes",
                path.display(),
                disk.len_bytes()
            ),
        ));
    }
    let mut findings = probe(&disk)?;
    findings.extend(label_at(&disk, size)?);
    if !args.force {
        refuse_content(&disk, &findings, "backing", "keeps it as the content of the volume")?;
    }
    Ok((Backing::Present(disk), size))
}

fn check_stage(registry: &Registry, args: &Create, path: &Path) -> Result<Stage> {
    if !paths::exists(path)? {
        let bytes = args.stage_size.map_or(STAGE_BYTES_DEFAULT, |s| s.0);
        let options = engine::STAGE_OPTIONS;
        Geometry::for_device(bytes, options.block_bytes, options.region_bytes, options.patch_bytes)?;
        return Ok(Stage::Missing { bytes });
    }
    if args.stage_size.is_some() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{} exists: --stage-size is for files that have to be made; leave it out",
                path.display()
            ),
        ));
    }
    let look = FileDisk::open_to_look(path).map_err(|e| e.within("stage"))?;
    let read = engine::read_superblock(&look);
    if let Ok(read) = &read
        && let Some(client) = Client::connect(&registry.stage_dir(read.superblock.stage_uuid))
    {
        return Ok(Stage::Online { client, superblock: Box::new(read.superblock.clone()) });
    }
    drop(look);
    let disk = FileDisk::open_exclusive(path).map_err(|e| e.within("stage"))?;
    // Again, now that nobody else writes.
    match engine::read_superblock(&disk) {
        Ok(read) => return Ok(Stage::Offline { disk, superblock: Box::new(read.superblock) }),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) if args.force && matches!(e.kind(), ErrorKind::Damaged | ErrorKind::NewerFormat) => {}
        Err(e) => return Err(e.within("stage")),
    }
    let options = StageOptions::for_disk(&disk);
    Geometry::for_device(disk.len_bytes(), options.block_bytes, options.region_bytes, options.patch_bytes)
        .map_err(|e| e.within(format!("stage {}", path.display())))?;
    let findings = probe(&disk)?;
    if !args.force {
        refuse_content(&disk, &findings, "stage", "destroys it")?;
    }
    let wipe = findings.iter().any(|f: &Finding| f.content != Content::Unknown);
    Ok(Stage::Blank { disk, wipe })
}

fn check_room(superblock: &Superblock, path: &Path, name: &str) -> Result<()> {
    let exists = |what: String| Err(Error::new(ErrorKind::Exists, what));
    if superblock.volumes.iter().any(|v| v.name == name) {
        return exists(format!(
            "stage {} has a volume '{name}' that this machine has no entry for: `tidegate attach {name} --stage {}` enters it, \
             or use another name",
            path.display(),
            path.display()
        ));
    }
    if superblock.volumes.len() >= VOLUMES_MAX {
        return exists(format!(
            "stage {} has {VOLUMES_MAX} volumes, the most there can be: use another",
            path.display()
        ));
    }
    Ok(())
}

/// The part that writes.
struct Work<'a> {
    registry: &'a Registry,
    signals: &'a Signals,
    stage_path: &'a Path,
    backing_path: &'a Path,
}

impl Work<'_> {
    fn carry_out(&self, stage: Stage, backing: Backing, info: &VolumeInfo) -> Result<(Entry, u64)> {
        let mut made = Vec::new();
        let outcome = self.try_to(stage, backing, info, &mut made);
        if outcome.is_err() {
            for path in &made {
                if let Err(e) = std::fs::remove_file(path) {
                    let _ = writeln!(
                        std::io::stderr(),
                        "tidegate: cannot remove {}, which was made in vain: {e}",
                        path.display()
                    );
                }
            }
        }
        outcome.map(|entry| (entry, info.size_bytes))
    }

    fn try_to(
        &self,
        stage: Stage,
        backing: Backing,
        info: &VolumeInfo,
        made: &mut Vec<PathBuf>,
    ) -> Result<Entry> {
        self.signals.check()?;
        let stage = match stage {
            Stage::Missing { bytes } => {
                self.make(self.stage_path, bytes, Fill::Zeroes)?;
                made.push(self.stage_path.to_owned());
                Stage::Blank { disk: FileDisk::open_exclusive(self.stage_path)?, wipe: false }
            }
            there => there,
        };
        let backing = match backing {
            Backing::Missing => {
                self.make(self.backing_path, backing_bytes_for(info.size_bytes), Fill::Sparse)?;
                made.push(self.backing_path.to_owned());
                FileDisk::open_exclusive(self.backing_path)?
            }
            Backing::Present(disk) => disk,
        };
        if overlap(Identity::of_path(self.stage_path)?, backing.identity()) {
            return Err(same(self.stage_path, self.backing_path));
        }
        self.signals.check()?;
        let (stage_uuid, volume_uuid) = self.enter(&stage, backing, info)?;
        let entry = Entry::new(
            &info.name,
            self.stage_path.to_owned(),
            stage_uuid,
            self.backing_path.to_owned(),
            volume_uuid,
        );
        self.registry.put(&entry).inspect_err(|_| take_back(&stage, &info.name))?;
        Ok(entry)
    }

    fn make(&self, path: &Path, bytes: u64, fill: Fill) -> Result<()> {
        let mut progress = report::Progress::new();
        let mut stopped = Ok(());
        let made = create_file(path, bytes, fill, &mut |done| {
            if done.is_multiple_of(64 << 20) {
                progress.show(&format!("writing {}: {} of {}", path.display(), human(done), human(bytes)));
            }
            stopped = self.signals.check();
            stopped.is_ok()
        });
        stopped.and(made)
    }

    /// Adds the volume to the stage; UUIDs of stage and volume.
    fn enter(&self, stage: &Stage, backing: FileDisk, info: &VolumeInfo) -> Result<(Uuid, Uuid)> {
        let new = || NewVolume {
            name: info.name.clone(),
            size_bytes: info.size_bytes,
            block_bytes: info.block_bytes,
            ack: info.ack,
            on_log_error: info.on_log_error,
            backing: info.backing.clone(),
        };
        match stage {
            Stage::Blank { disk, wipe } => {
                if *wipe {
                    wipe_ends(disk)?;
                }
                let superblock = engine::create_stage(disk, StageOptions::for_disk(disk))?;
                Ok((superblock.stage_uuid, engine::add_volume(disk, &backing, new())?.uuid))
            }
            Stage::Offline { disk, superblock } => {
                Ok((superblock.stage_uuid, engine::add_volume(disk, &backing, new())?.uuid))
            }
            Stage::Online { client, superblock } => {
                // The server locks it in turn.
                drop(backing);
                let reply = client.ask(Request::AddVolume {
                    name: info.name.clone(),
                    backing: info.backing.clone(),
                    size_bytes: info.size_bytes,
                    block_bytes: info.block_bytes,
                    ack: info.ack,
                    on_log_error: info.on_log_error,
                })?;
                match reply {
                    Reply::Volume(uuid) => Ok((superblock.stage_uuid, uuid)),
                    other => Err(client.odd(&other)),
                }
            }
            Stage::Missing { .. } => unreachable!("it was made before"),
        }
    }
}

/// Removes the volume from the stage again because its name could not be entered.
fn take_back(stage: &Stage, name: &str) {
    let taken = match stage {
        Stage::Blank { disk, .. } | Stage::Offline { disk, .. } => engine::remove_volume(disk, name),
        Stage::Online { client, .. } => {
            client.ask(Request::RemoveVolume { volume: name.to_owned() }).map(|_| ())
        }
        Stage::Missing { .. } => Ok(()),
    };
    if let Err(e) = taken {
        let _ = writeln!(
            std::io::stderr(),
            "tidegate: volume '{name}' stays on the stage without an entry: {}",
            e.report()
        );
    }
}

fn wipe_ends(disk: &FileDisk) -> Result<()> {
    let len = disk.len_bytes();
    let zeroes = vec![0; WIPE_BYTES.min(len) as usize];
    disk.write(0, &zeroes)?;
    disk.write(len - zeroes.len() as u64, &zeroes)?;
    disk.sync()
}
