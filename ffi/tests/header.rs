//! `include/tidegate.h` is what the code says. TIDEGATE_UPDATE_HEADER=1 writes it anew.

use std::fs;
use std::path::Path;

use cbindgen::{Builder, Config, DocumentationStyle, Language, Layout, Style};

fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut config = Config {
        language: Language::C,
        cpp_compat: true,
        style: Style::Both,
        include_guard: Some("TIDEGATE_H".to_owned()),
        sys_includes: ["stddef.h", "stdint.h", "sys/types.h", "sys/uio.h"].map(str::to_owned).to_vec(),
        no_includes: true,
        usize_is_size_t: true,
        documentation_style: DocumentationStyle::Doxy,
        header: Some(fs::read_to_string(root.join("tests/header.txt")).unwrap().trim_end().to_owned()),
        line_length: 128,
        ..Config::default()
    };
    config.function.args = Layout::Auto;
    // No function takes them by type: a C program may pass any number.
    config.export.include =
        ["tg_operation", "tg_flag", "tg_open_flag", "tg_ack", "tg_log_flag"].map(str::to_owned).to_vec();
    config.export.rename.insert("iovec".to_owned(), "struct iovec".to_owned());
    let mut builder = Builder::new().with_config(config);
    for file in ["abi", "device", "transfer", "log"] {
        builder = builder.with_src(root.join(format!("src/{file}.rs")));
    }
    let mut header = Vec::new();
    builder.generate().unwrap().write(&mut header);
    String::from_utf8(header).unwrap()
}

#[test]
fn header_is_what_the_code_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/tidegate.h");
    let generated = generated();
    if std::env::var_os("TIDEGATE_UPDATE_HEADER").is_some() {
        fs::write(&path, generated).unwrap();
    } else if fs::read_to_string(&path).ok().as_deref() != Some(generated.as_str()) {
        panic!("{} is stale: run with TIDEGATE_UPDATE_HEADER=1", path.display());
    }
}
