//! The library as C programs use it: the programs of `tests/c`, against a live server where they need one, alone, under
//! valgrind, and with the sanitizers. What a machine has no tool for is said and left out.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Longest that a program may take, under valgrind as well.
const LIMIT: Duration = Duration::from_secs(240);
const VALGRIND: &[&str] = &[
    "--quiet",
    "--error-exitcode=99",
    "--leak-check=full",
    "--show-leak-kinds=definite",
    "--errors-for-leak-kinds=definite",
    "--fair-sched=yes",
];

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo puts what is built with the profile of this test.
fn out_dir() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned()
}

/// What a case panics with that cannot run on this machine.
struct Skipped(String);

fn skip(why: impl Into<String>) -> ! {
    panic::resume_unwind(Box::new(Skipped(why.into())))
}

fn need(tool: &str) {
    if !Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success()) {
        skip(format!("this machine has no {tool}"));
    }
}

fn succeeded(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

/// The library and the command, built once: where they are.
fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    ["cc", "ld", "objcopy"].into_iter().for_each(need);
    BUILT.get_or_init(|| {
        let out = out_dir();
        let profile = match out.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            other => other,
        };
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "tidegate-ffi", "-p", "tidegate-tools", "--profile", profile]);
        succeeded(cargo.arg("--target-dir").arg(out.parent().unwrap()).current_dir(crate_dir().join("..")));
        succeeded(Command::new(crate_dir().join("link")).arg(&out));
        out
    })
}

/// How a program is built and run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Plain,
    Valgrind,
    Sanitizers,
}

impl Way {
    const ALL: [Way; 3] = [Way::Plain, Way::Valgrind, Way::Sanitizers];

    fn need(self) {
        match self {
            Way::Plain => {}
            Way::Valgrind => need("valgrind"),
            Way::Sanitizers => {
                let dir = tempfile::tempdir().unwrap();
                let source = dir.path().join("empty.c");
                fs::write(&source, "int main(void) { return 0; }\n").unwrap();
                let mut cc = Command::new("cc");
                cc.arg("-fsanitize=address,undefined").arg(&source).arg("-o").arg(dir.path().join("empty"));
                if !cc.output().is_ok_and(|output| output.status.success()) {
                    skip("the C compiler has no sanitizers");
                }
            }
        }
    }
}

/// A command that runs a program of `tests/c`.
fn program(name: &str, way: Way, dir: &Path) -> Command {
    let out = built();
    way.need();
    let exe = dir.join(format!("{name}-{way:?}"));
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-pedantic", "-Werror"]);
    cc.arg("-I").arg(crate_dir().join("include")).arg(crate_dir().join(format!("tests/c/{name}.c")));
    if way == Way::Sanitizers {
        cc.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
        cc.arg(out.join("libtidegate.a")).args(["-lgcc_s", "-lm", "-ldl"]);
    } else {
        cc.arg("-L").arg(out).arg("-ltidegate").arg(format!("-Wl,-rpath,{}", out.display()));
    }
    succeeded(cc.arg("-lpthread").arg("-o").arg(&exe));
    if way != Way::Valgrind {
        return Command::new(exe);
    }
    let mut valgrind = Command::new("valgrind");
    valgrind.args(VALGRIND).arg(exe);
    valgrind
}

/// Waits for the end of a program, but not for ever.
fn finished(mut child: Child, what: &str) {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            panic!("{what} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert!(status.success(), "{what}: {status}\n{}", String::from_utf8_lossy(&stderr));
}

fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A stage with two volumes and one with one, attached as byte devices until the end of the test.
struct Server {
    dir: tempfile::TempDir,
    tidegate: PathBuf,
}

const VOLUMES: [(&str, &str); 3] = [("first", "stage1"), ("second", "stage1"), ("third", "stage2")];

impl Server {
    fn start() -> Server {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["state", "run", "programs"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let server = Server { dir, tidegate: built().join("tidegate") };
        let mut made = BTreeSet::new();
        for (volume, stage) in VOLUMES {
            let mut create = server.command("create");
            create.args([volume, "--size", "64M", "--backing"]).arg(server.path(volume));
            create.arg("--stage").arg(server.path(stage));
            if made.insert(stage) {
                create.args(["--stage-size", "256M"]);
            }
            succeeded(&mut create);
            server.attach(volume);
        }
        server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(&self.tidegate);
        command
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg(what)
            .env("TIDEGATE_RUN_DIR", self.path("run"));
        command
    }

    fn attach(&self, volume: &str) {
        succeeded(self.command("attach").args([volume, "--bytes"]));
    }

    fn program(&self, name: &str, way: Way) -> Command {
        let mut command = program(name, way, &self.path("programs"));
        command.env("TIDEGATE_RUN_DIR", self.path("run")).args(VOLUMES.map(|(volume, _)| volume));
        command
    }

    /// Ends the server of the first volume without a word. Its supervisor starts another.
    fn kill(&self) {
        let status = succeeded(self.command("status").args(["first", "--json"]));
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let pid = status["volumes"][0]["pid"].as_u64().expect("it is attached");
        succeeded(Command::new("kill").args(["-9", &pid.to_string()]));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for (volume, _) in VOLUMES {
            let _ = self.command("detach").args([volume, "--force", "--no-flush"]).output();
        }
    }
}

fn without_server(name: &str, way: Way) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = program(name, way, dir.path());
    finished(start(command.arg(dir.path())), name);
}

fn with_server(server: &Server, name: &str, way: Way) {
    finished(start(&mut server.program(name, way)), name);
}

fn whose_server_dies(server: &Server, way: Way) {
    let mut child = start(&mut server.program("gone", way));
    let mut said = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
    if said == "ready\n" {
        server.kill();
        child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }
    finished(child, "gone");
}

fn header_compiles(compiler: &str, standard: &str, end: &str) {
    need(compiler);
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join(format!("use.{end}"));
    fs::write(&source, "#include \"tidegate.h\"\nint main(void) { return tg_version() == 0; }\n").unwrap();
    let mut command = Command::new(compiler);
    command.arg(format!("-std={standard}")).args(["-Wall", "-Wextra", "-pedantic", "-Werror", "-c"]);
    command.arg("-I").arg(crate_dir().join("include")).arg(&source).arg("-o").arg(dir.path().join("use.o"));
    succeeded(&mut command);
}

/// Names in a text that begin with `tg_` and are followed by `end`.
fn names(text: &str, end: char) -> BTreeSet<String> {
    let is_name = |c: char| c == '_' || c.is_ascii_alphanumeric();
    text.split(|c: char| !is_name(c) && c != end)
        .filter_map(|word| word.strip_suffix(end).or_else(|| word.split_once(end).map(|(name, _)| name)))
        .filter(|name| name.starts_with("tg_") && name.chars().all(is_name))
        .map(str::to_owned)
        .collect()
}

fn the_library_exports_what_the_header_has_and_nothing_else() {
    let header = fs::read_to_string(crate_dir().join("include/tidegate.h")).unwrap();
    let code: String = header
        .lines()
        .filter(|l| !l.trim_start().starts_with(['*', '/', '#', ' ']))
        .map(|l| format!("{l}\n"))
        .collect();
    let declared = names(&code, '(');
    assert!(declared.len() >= 30 && declared.contains("tg_open"), "{declared:?}");
    assert_eq!(names(&fs::read_to_string(crate_dir().join("tidegate.map")).unwrap(), ';'), declared);
    let out = built();
    let exported = |nm: &mut Command| -> BTreeSet<String> {
        let lines = succeeded(nm);
        lines
            .lines()
            .filter_map(|l| l.split_whitespace().nth(2))
            .map(|n| n.split('@').next().unwrap().to_owned())
            .collect()
    };
    let mut shared =
        exported(Command::new("nm").args(["-D", "--defined-only"]).arg(out.join("libtidegate.so")));
    assert!(shared.remove("TIDEGATE_0.1"));
    assert_eq!(shared, declared);
    assert_eq!(
        exported(Command::new("nm").args(["-g", "--defined-only"]).arg(out.join("libtidegate.a"))),
        declared
    );
    let dynamic = succeeded(Command::new("readelf").arg("-dW").arg(out.join("libtidegate.so")));
    assert!(dynamic.contains("soname: [libtidegate.so.0]"), "{dynamic}");
}

fn the_manual_has_every_function() {
    let manual = fs::read_to_string(crate_dir().join("man/libtidegate.3")).unwrap();
    let map = fs::read_to_string(crate_dir().join("tidegate.map")).unwrap();
    let missing: Vec<String> =
        names(&map, ';').into_iter().filter(|name| !manual.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn the_manual_is_well_formed() {
    need("man");
    let mut man = Command::new("man");
    man.args(["--warnings", "-l"]).arg(crate_dir().join("man/libtidegate.3"));
    let output = man.env("LC_ALL", "C.UTF-8").env("MANWIDTH", "80").output().unwrap();
    let warnings = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && warnings.is_empty(), "{warnings}");
}

type Case = (String, Box<dyn Fn()>);

fn cases(server: &Rc<OnceCell<Server>>) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |name: &str, case: Box<dyn Fn()>| cases.push((name.to_owned(), case));
    for (compiler, standard, end) in
        [("gcc", "c99", "c"), ("clang", "c2x", "c"), ("g++", "c++11", "cc"), ("clang++", "c++20", "cc")]
    {
        let case = move || header_compiles(compiler, standard, end);
        add(&format!("header {compiler} {standard}"), Box::new(case));
    }
    add("exported names", Box::new(the_library_exports_what_the_header_has_and_nothing_else));
    add("manual: complete", Box::new(the_manual_has_every_function));
    add("manual: well formed", Box::new(the_manual_is_well_formed));
    for way in Way::ALL {
        for name in ["offline", "greeting"] {
            add(&format!("{name} {way:?}"), Box::new(move || without_server(name, way)));
        }
        for name in ["happy", "bad", "threads"] {
            let server = Rc::clone(server);
            let case = move || with_server(server.get_or_init(Server::start), name, way);
            add(&format!("{name} {way:?}"), Box::new(case));
        }
        let server = Rc::clone(server);
        let case = move || whose_server_dies(server.get_or_init(Server::start), way);
        add(&format!("gone {way:?}"), Box::new(case));
    }
    cases
}

fn main() {
    // Options of the usual test harness are accepted and have no meaning here.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let server = Rc::new(OnceCell::new());
    let mut cases = cases(&server);
    if std::env::args().any(|a| a == "--list") {
        cases.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    cases.retain(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())));
    println!("\nrunning {} tests", cases.len());
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, case) in cases {
        print!("test {name} ... ");
        std::io::stdout().flush().unwrap();
        let start = Instant::now();
        match panic::catch_unwind(AssertUnwindSafe(case)) {
            Ok(()) => {
                passed += 1;
                println!("ok ({:.1} s)", start.elapsed().as_secs_f32());
            }
            Err(why) => match why.downcast_ref::<Skipped>() {
                Some(Skipped(why)) => {
                    skipped += 1;
                    println!("ignored\nSKIPPED: {name}: {why}");
                }
                None => {
                    failed += 1;
                    println!("FAILED");
                }
            },
        }
    }
    drop(server);
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {result}. {passed} passed; {failed} failed; {skipped} ignored");
    std::process::exit(i32::from(failed > 0));
}
