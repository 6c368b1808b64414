//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tidegate_driver::format::volume_entry::{AckLevel, OnLogError};

use crate::size::Size;

/// Where names are kept unless asked otherwise.
pub const STATE_DIR: &str = "/var/lib/tidegate";

const EXAMPLES: &str = "\
Examples:
  # A fast log in front of a slow disk:
  tidegate create db --stage /dev/nvme0n1p4 --backing /dev/sdb
  DEVICE=$(tidegate attach db)
  mkfs.xfs \"$DEVICE\" && mount \"$DEVICE\" /srv/db
  tidegate status db
  umount /srv/db && tidegate detach db

  # To try it, with files, until Ctrl-C:
  tidegate run /tmp/try --size 1G
";

/// Presents any block device with a fast, ordered, durable write log in front of it.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, about, max_term_width = 100, after_help = after_help(), propagate_version = true)]
pub struct Cli {
    /// Directory of names, sockets and logs
    #[arg(long, global = true, env = "TIDEGATE_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

fn after_help() -> String {
    format!("{EXAMPLES}\n{}", crate::exit::help())
}

/// The commands. Scripts rely on these names.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a volume: a stage (log) in front of a backing device
    #[command(after_help = CREATE_HELP)]
    Create(Create),
    /// Make the volume's block device; prints its path once it is live
    #[command(after_help = ATTACH_HELP)]
    Attach(Attach),
    /// End the volume's block device
    #[command(after_help = DETACH_HELP)]
    Detach(Detach),
    /// Show volumes, stages and servers
    #[command(after_help = STATUS_HELP)]
    Status(Status),
    /// Verify a stage offline: exit 0 clean, 1 damage found, 2 could not check
    #[command(after_help = "Examples:\n  tidegate check db\n  tidegate check --stage /dev/nvme0n1p4 --json")]
    Check(Check),
    /// Decode every structure on a device or file
    #[command(
        after_help = "Examples:\n  tidegate inspect /dev/nvme0n1p4\n  tidegate inspect stage.img --json --limit 10"
    )]
    Inspect(Inspect),
    /// Create if missing, attach, stay in the foreground, detach on Ctrl-C
    #[command(
        after_help = "Example:\n  tidegate run /tmp/try --size 1G\n\nThe files are DIR/stage and DIR/backing."
    )]
    Run(Run),
    /// Remove a volume from its stage; files and devices stay
    #[command(after_help = "Example:\n  tidegate detach db && tidegate delete db")]
    Delete(Delete),
    /// Make a volume larger
    #[command(
        after_help = "Example:\n  lvextend -L +10G /dev/vg/db && tidegate resize db 50G && xfs_growfs /srv/db"
    )]
    Resize(Resize),
    /// Bring everything that was written to the backing device now
    #[command(after_help = "Example:\n  tidegate flush db && lvcreate -s -n snap vg/db")]
    Flush(Name),
    /// Serve a stage (started by attach)
    #[command(hide = true)]
    Serve(Serve),
    /// Keep a server running (started by attach)
    #[command(hide = true)]
    Supervise(StageArg),
    /// Print the link of a block device (for udev)
    #[command(hide = true)]
    LinkOf {
        /// What the kernel calls it
        device: String,
    },
    /// Print shell completions
    #[command(hide = true)]
    Completion {
        /// Shell
        shell: clap_complete::Shell,
    },
}

const CREATE_HELP: &str = "\
PATH is a block device or a file; a missing file is created. A --stage that is a stage already gets the volume added, and
its volumes then share one order and one server.

Nothing is written before every check has passed. A device that holds data is refused without --force. --force keeps
what is on the backing (it becomes the content of the volume, apart from 64 KiB after its end) and overwrites the stage.

Examples:
  tidegate create db --stage /dev/nvme0n1p4 --backing /dev/sdb
  tidegate create vm1 --stage /var/tidegate/log --stage-size 4G --backing /srv/vm1.img --size 100G
  tidegate create scratch --stage /dev/nvme0n1p4 --backing /dev/sdc --ack memory";

const ATTACH_HELP: &str = "\
Attaching a volume that is attached prints its path; one whose server died waits until it is live again. The device also
has the name /dev/tidegate/NAME.

With --bytes the volume becomes a byte device: programs use it with libtidegate through /run/tidegate/NAME.sock (or
$TIDEGATE_RUN_DIR/NAME.sock). A volume is a block device or a byte device, never both at once.

--poll trades processor time for latency: threads that look are there when the next request comes. They look only while that
pays and nobody else wants the processor; 0 turns it off. It holds from when a server makes or takes over the device. --queues
holds from when a device is made: one that is taken over keeps what it has.

A server started here ends with the last detach. On SIGTERM it ends too: devices in use are not taken away, they wait for
the next attach, with everything that was accepted kept.

Examples:
  tidegate attach db
  tidegate attach log --bytes --allow user:postgres   # for programs with libtidegate; prints the socket's path
  tidegate attach db --foreground            # for systemd: see tidegate@.service
  tidegate attach db --stage /dev/nvme1n1p4  # the stage, or a volume from another machine, is found here";

const DETACH_HELP: &str = "\
Refused while the device is mounted or open. What is not on the backing yet is flushed first; --no-flush leaves it in
the stage, from where the next attach serves it. --force ends the device under whoever uses it: their further requests
fail, and what they had not synced may be lost. What was accepted is kept.

Examples:
  umount /srv/db && tidegate detach db
  tidegate detach db --no-flush";

const STATUS_HELP: &str = "\
States: attached, ending (its server was told to end), detached, recovering, waiting (the device is there and waits for a
server: attach it), server-died (the same after a crash), not-answering (the server hangs), error.

JSON: {\"volumes\": [{\"name\", \"state\", \"device\", \"pid\", …}], \"stages\": [{\"uuid\", \"path\", \"pid\", …}]}; sizes are bytes.

Examples:
  tidegate status
  tidegate status db --json
  tidegate status --watch";

/// `create`.
#[derive(Debug, Args)]
pub struct Create {
    /// Name of the volume: letters, digits, '.', '_', '-'
    pub name: String,
    /// Device or file of the log
    #[arg(long, value_name = "PATH")]
    pub stage: PathBuf,
    /// Device or file that finally holds the data
    #[arg(long, value_name = "PATH")]
    pub backing: PathBuf,
    /// Size of the volume, with K, M, G, T [default: what the backing holds]
    #[arg(long, allow_hyphen_values = true)]
    pub size: Option<Size>,
    /// Size of the stage file if it has to be made [default: 1G]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub stage_size: Option<Size>,
    /// When a write is acknowledged: in the log on disk, or in memory until the next flush
    #[arg(long, value_enum, default_value = "log", value_name = "LEVEL")]
    pub ack: Ack,
    /// Logical block size of the device in bytes: 512, 1024, 2048, 4096
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub block_size: u32,
    /// What writers get while the log device fails: they wait, or an error
    #[arg(long, value_enum, default_value = "stall", value_name = "WHAT")]
    pub on_log_error: OnError,
    /// Use devices that hold data
    #[arg(long)]
    pub force: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Ack levels on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ack {
    /// Durable on the log device
    Log,
    /// In memory that outlives the server; a FLUSH waits for the log device
    Memory,
}

impl From<Ack> for AckLevel {
    fn from(ack: Ack) -> AckLevel {
        match ack {
            Ack::Log => AckLevel::Log,
            Ack::Memory => AckLevel::Memory,
        }
    }
}

/// Policies on log errors on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// Writers wait until the log works again
    Stall,
    /// Writers get an I/O error
    Fail,
}

impl From<OnError> for OnLogError {
    fn from(policy: OnError) -> OnLogError {
        match policy {
            OnError::Stall => OnLogError::Stall,
            OnError::Fail => OnLogError::Fail,
        }
    }
}

/// `attach`.
#[derive(Debug, Args)]
pub struct Attach {
    /// Name of the volume
    pub name: String,
    /// Make a byte device (a socket for libtidegate) instead of a block device
    #[arg(long)]
    pub bytes: bool,
    /// Who may use the byte device besides root: user:NAME or group:NAME
    #[arg(long, value_name = "WHO", requires = "bytes")]
    pub allow: Vec<Allow>,
    /// Serve in this process, detach on SIGTERM and SIGINT
    #[arg(long)]
    pub foreground: bool,
    /// Where the stage is now (also enters a volume that this machine does not know)
    #[arg(long, value_name = "PATH")]
    pub stage: Option<PathBuf>,
    /// Where the backing is now
    #[arg(long, value_name = "PATH")]
    pub backing: Option<PathBuf>,
    /// How long the device's threads look for the next request before they sleep; kept for later [default: 200]
    #[arg(
        long,
        value_name = "MICROSECONDS",
        conflicts_with = "bytes",
        value_parser = clap::value_parser!(u32).range(..=i64::from(crate::engine::POLL_US_MAX))
    )]
    pub poll: Option<u32>,
    /// Queues of the device, each with a thread, at most one a processor; kept for later [default: one for four processors]
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "bytes",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(crate::engine::QUEUES_MAX))
    )]
    pub queues: Option<u16>,
    /// Go on although writes that were acknowledged from memory are lost
    #[arg(long)]
    pub accept_loss: bool,
    /// Wait so long for stage and backing to appear
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub wait: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// A user or a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allow {
    /// Name or number.
    User(String),
    /// Name or number.
    Group(String),
}

impl std::str::FromStr for Allow {
    type Err = String;

    fn from_str(text: &str) -> Result<Allow, String> {
        match text.split_once(':') {
            Some(("user", name)) if !name.is_empty() => Ok(Allow::User(name.to_owned())),
            Some(("group", name)) if !name.is_empty() => Ok(Allow::Group(name.to_owned())),
            _ => Err("say user:NAME or group:NAME".to_owned()),
        }
    }
}

/// `detach`.
#[derive(Debug, Args)]
pub struct Detach {
    /// Name of the volume
    pub name: String,
    /// Leave in the stage what is not on the backing yet
    #[arg(long)]
    pub no_flush: bool,
    /// Take the device away from whoever uses it, and without a server if none can be started
    #[arg(long)]
    pub force: bool,
}

/// `status`.
#[derive(Debug, Args)]
pub struct Status {
    /// Name of a volume [default: all]
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print again every second
    #[arg(long)]
    pub watch: bool,
}

/// `check`.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct CheckTarget {
    /// Name of a volume, whose stage is checked
    pub name: Option<String>,
    /// Device or file of a stage
    #[arg(long, value_name = "PATH")]
    pub stage: Option<PathBuf>,
}

/// `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// What to check
    #[command(flatten)]
    pub target: CheckTarget,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// Device or file
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Most records to decode
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub limit: usize,
}

/// `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Directory for stage and backing; made if missing
    pub dir: PathBuf,
    /// Size of the volume if it has to be made [default: 1G]
    #[arg(long, allow_hyphen_values = true)]
    pub size: Option<Size>,
}

/// `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// Name of the volume
    pub name: String,
    /// Also if stage or backing are gone; what is staged for the volume is discarded
    #[arg(long)]
    pub force: bool,
}

/// `resize`.
#[derive(Debug, Args)]
pub struct Resize {
    /// Name of the volume
    pub name: String,
    /// New size
    #[arg(allow_hyphen_values = true)]
    pub size: Size,
}

/// Commands that need a name only.
#[derive(Debug, Args)]
pub struct Name {
    /// Name of the volume
    pub name: String,
}

/// A stage by its UUID.
#[derive(Debug, Args)]
pub struct StageArg {
    /// UUID
    pub stage: uuid::Uuid,
}

/// `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// The stage
    #[command(flatten)]
    pub stage: StageArg,
    /// Process id of the supervisor
    #[arg(long)]
    pub supervisor: Option<u32>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
