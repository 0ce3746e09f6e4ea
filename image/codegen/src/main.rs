//! Writes image/src/model/generated and wire/src/generated from the .proto files. Run in the project's root;
//! `.ci/full` runs it and fails if the committed files differ.

use std::path::Path;

fn generate(folder: &str, files: &[&str], out: &str) {
    let set = protox::compile(files, [folder]).expect("the .proto files compile");
    std::fs::create_dir_all(out).expect("the output folder can be made");
    let mut config = prost_build::Config::new();
    config.out_dir(Path::new(out)).format(true);
    config.compile_fds(set).expect("code is generated");
}

fn main() {
    let model = ["signals.proto", "timers.proto", "memory.proto", "sockets.proto", "files.proto", "task.proto"];
    generate(
        "image/proto",
        &model,
        "image/src/model/generated",
    );
}
