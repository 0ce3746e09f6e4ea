//! The rules of ARCHITECTURE.md that a machine can check: which crate may name which, where `unsafe` may stand, and that
//! each kernel object has its row in all three columns and a subject that proves it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::lifecycle::SUBJECTS;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What each package of the workspace depends on when it is built for users, by name.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs this test");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"]
        .as_array()
        .expect("a workspace has packages");
    let name = |value: &serde_json::Value| {
        value["name"]
            .as_str()
            .expect("packages have names")
            .to_owned()
    };
    packages
        .iter()
        .map(|package| {
            let list = package["dependencies"]
                .as_array()
                .expect("packages list them");
            (
                name(package),
                list.iter()
                    .filter(|one| one["kind"].as_str() != Some("dev"))
                    .map(name)
                    .collect(),
            )
        })
        .collect()
}

#[test]
fn arrows_between_crates_only_point_down() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        (
            "pageferry",
            &[
                "pageferry-pageserver",
                "pageferry-restorer",
                "pageferry-image",
                "pageferry-wire",
                "pageferry-tracee",
            ][..],
        ),
        (
            "pageferry-pageserver",
            &["pageferry-image", "pageferry-wire", "pageferry-tracee"],
        ),
        (
            "pageferry-restorer",
            &["pageferry-image", "pageferry-wire", "pageferry-tracee"],
        ),
        ("pageferry-wire", &["pageferry-image"]),
        ("pageferry-image", &[]),
        ("pageferry-tracee", &[]),
    ]);
    let found = dependencies();
    assert_eq!(
        found.keys().map(String::as_str).collect::<Vec<_>>(),
        allowed.keys().copied().collect::<Vec<_>>()
    );
    for (package, list) in &found {
        for dependency in list.iter().filter(|name| name.starts_with("pageferry")) {
            assert!(
                allowed[package.as_str()].contains(&dependency.as_str()),
                "{package} must not name {dependency}"
            );
        }
    }
}

#[test]
fn the_nouns_name_neither_network_nor_runtime() {
    let found = dependencies();
    for (package, forbidden) in [
        (
            "pageferry-wire",
            &["tokio", "quinn", "rustls", "nix", "libc", "procfs-core"][..],
        ),
        (
            "pageferry-image",
            &["tokio", "quinn", "rustls", "nix", "libc", "procfs-core"],
        ),
        ("pageferry-tracee", &["tokio", "quinn", "rustls", "prost"]),
    ] {
        for name in forbidden {
            assert!(
                !found[package].contains(*name),
                "{package} must not name {name}"
            );
        }
    }
    for (package, list) in &found {
        for name in ["procfs-core", "userfaultfd"] {
            assert!(
                package == "pageferry-tracee" || !list.contains(name),
                "only pageferry-tracee may name {name}, not {package}"
            );
        }
    }
}

/// Every Rust source of the workspace that a person wrote.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = [
        "src",
        "image/src",
        "wire/src",
        "tracee/src",
        "pageserver/src",
        "restorer/src",
        "tests",
    ]
    .map(|name| root().join(name))
    .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .flatten()
        {
            let path = entry.path();
            if path.is_dir() && path.file_name().is_none_or(|name| name != "generated") {
                folders.push(path);
            } else if path.extension().is_some_and(|suffix| suffix == "rs") {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn unsafe_code_has_one_address() {
    for (folder, roots) in [
        (".", &["lib.rs", "main.rs"][..]),
        ("image", &["lib.rs"]),
        ("wire", &["lib.rs"]),
        ("pageserver", &["lib.rs"]),
        ("restorer", &["lib.rs"]),
    ] {
        for file in roots {
            let path = root().join(folder).join("src").join(file);
            let text = fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(
                text.contains("#![forbid(unsafe_code)]"),
                "{} does not forbid unsafe code",
                path.display()
            );
        }
    }
    for path in sources() {
        // Test modules look at their own subjects as they like.
        if path.starts_with(root().join("tracee"))
            || path.ends_with("tests/architecture.rs")
            || path.ends_with("tests.rs")
        {
            continue;
        }
        let text = fs::read_to_string(&path).expect("it was listed");
        for word in [
            "nix::sys::ptrace",
            "sys::ptrace::",
            "libc::ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "pidfd_getfd(",
        ] {
            let named = text
                .lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(word));
            assert!(
                !named,
                "{} names {word}: only tracee touches a process",
                path.display()
            );
        }
    }
}

#[test]
fn every_file_says_what_it_hides() {
    for path in sources() {
        let text = fs::read_to_string(&path).expect("it was listed");
        assert!(
            text.starts_with("//! "),
            "{} does not begin with a paragraph about itself",
            path.display()
        );
    }
}

fn stems(folder: &str, suffix: &str) -> BTreeSet<String> {
    fs::read_dir(root().join(folder))
        .unwrap_or_else(|error| panic!("{folder}: {error}"))
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(suffix)?.to_owned()))
        .collect()
}

#[test]
fn every_kernel_object_has_its_row_in_three_columns() {
    let model = stems("image/src/model", ".rs");
    // What tests the whole of capture is no object.
    let mut captured = stems("pageserver/src/capture", ".rs");
    captured.remove("tests");
    assert!(model.len() >= 6, "{model:?}");
    assert_eq!(model, captured, "captured, against the model");
    assert_eq!(
        model,
        stems("restorer/src/rebuild", ".rs"),
        "rebuilt, against the model"
    );
    assert_eq!(
        model,
        stems("image/proto", ".proto"),
        "written down, against the model"
    );
}

#[test]
fn every_subject_has_a_test() {
    let mut tested: BTreeSet<String> = SUBJECTS
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    // Those that other tests use.
    tested.extend(["steadfast", "refused", "library_user", "vfork", "isolated"].map(str::to_owned));
    assert_eq!(stems("tests/subjects", ".c"), tested);
}

/// The rows of the tables below a heading of `docs/coverage.md`, up to the next heading: their cells.
fn rows<'t>(text: &'t str, heading: &str) -> Vec<Vec<&'t str>> {
    let (_, after) = text
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("no heading {heading:?}"));
    let section = after.split("\n## ").next().unwrap_or(after);
    section
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|row| row.split(" | ").collect())
        .collect()
}

/// What is said to be carried is carried before our eyes: each row names what shows it, all that shows something is named, and
/// each object is described by one file of the model.
#[test]
fn the_coverage_table_names_what_shows_each_row() {
    let text = fs::read_to_string(root().join("docs/coverage.md")).expect("it is there");
    let subjects: BTreeSet<&str> = SUBJECTS.iter().map(|(name, _)| *name).collect();
    let mut shown = BTreeSet::new();
    let mut objects = Vec::new();
    let mut described = Vec::new();
    let mut files = Vec::new();
    for row in rows(&text, "Carried") {
        match row[..] {
            ["object", "how", _] | ["file", "objects"] => {}
            [object, _, by] => {
                objects.push(object);
                for name in by.split(", ").map(|name| name.trim_matches('`')) {
                    if let Some((file, test)) = name.split_once("::") {
                        let source = fs::read_to_string(root().join(format!("tests/{file}.rs")))
                            .unwrap_or_else(|error| panic!("{object}: {name}: {error}"));
                        assert!(
                            source.contains(&format!("#[test]\nfn {test}()")),
                            "{object}: there is no test {name}"
                        );
                    } else {
                        assert!(
                            subjects.contains(name),
                            "{object}: no subject {name} crosses"
                        );
                        shown.insert(name);
                    }
                }
            }
            [file, list] => {
                files.push(file.trim_matches('`').to_owned());
                described.extend(list.split("; "));
            }
            _ => panic!("a row of {} cells: {row:?}", row.len()),
        }
    }
    assert_eq!(
        shown, subjects,
        "named in the table, against those that cross"
    );
    files.sort_unstable();
    assert_eq!(
        files,
        Vec::from_iter(stems("image/src/model", ".rs")),
        "the files that are said to describe objects, each once, against those there are"
    );
    objects.sort_unstable();
    described.sort_unstable();
    assert_eq!(objects, described, "carried, each once, against described");
}

/// `./demo` and `./test` are what a newcomer types first; a script that does not even parse is not found by any compiler.
#[test]
fn scripts_parse() {
    for script in [
        "demo",
        "test",
        ".ci/run",
        ".ci/full",
        ".ci/soak",
        ".ci/prepare.sh",
    ] {
        let output = Command::new("bash")
            .args(["-n", script])
            .current_dir(root())
            .output()
            .expect("bash is there");
        assert!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Without root both say so, with the line that helps, and exit with 3.
#[test]
fn scripts_without_root_exit_with_3() {
    if !nix::unistd::geteuid().is_root() || crate::hosts::skip().is_some() {
        return;
    }
    for script in ["demo", "test"] {
        let text = fs::read_to_string(root().join(script)).expect("it is part of the project");
        // As a user who can read the script but, perhaps, not the folder it lies in.
        let folder = crate::hosts::programs_directory().join(format!("scripts-{script}"));
        fs::create_dir_all(folder.join(".ci")).expect("the folder is ours");
        fs::write(folder.join(script), text).expect("the folder is ours");
        fs::copy(root().join(".ci/prepare.sh"), folder.join(".ci/prepare.sh"))
            .expect("it is part of the project");
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "bash"])
            .arg(folder.join(script))
            .current_dir("/")
            .output()
            .expect("setpriv was found");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{script}: {said}");
        assert!(said.contains("run: sudo "), "{script} says {said}");
    }
}
