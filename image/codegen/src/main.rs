//! Writes image/src/model/generated and wire/src/generated from the .proto files. Run in the project's root;
//! `.ci/full` runs it and fails if the committed files differ.

use std::path::Path;

/// Compiles `files`, found in `folders`, into `out`. Packages of the model are taken from the image crate unless it is the
/// model itself that is written.
fn generate(folders: &[&str], files: &[&str], out: &str, model_is_elsewhere: bool) {
    let set = protox::compile(files, folders).expect("the .proto files compile");
    std::fs::create_dir_all(out).expect("the output folder can be made");
    let mut config = prost_build::Config::new();
    config.out_dir(Path::new(out)).format(true);
    if model_is_elsewhere {
        for module in ["files", "locks", "memory", "relations", "shared", "signals", "sockets", "task", "timers"] {
            config.extern_path(format!(".pageferry.{module}"), format!("::pageferry_image::model::{module}"));
        }
    }
    config.compile_fds(set).expect("code is generated");
}

fn main() {
    let model = ["signals.proto", "timers.proto", "memory.proto", "shared.proto", "sockets.proto", "files.proto", "locks.proto", "relations.proto", "task.proto"];
    generate(&["image/proto"], &model, "image/src/model/generated", false);
    generate(&["wire/proto", "image/proto"], &["message.proto"], "wire/src/generated", true);
}
