//! Generates the messages, the client and the server trait from `proto/agent.proto`.

use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default())
        .run()
        .expect("proto/agent.proto compiles");
    // The generated files open with inner attributes, which `include!` does not take: they have to
    // be modules with a path of their own.
    let modules: String = ["agent", "agent_ttrpc"]
        .iter()
        .map(|name| {
            let file = out.join(format!("{name}.rs"));
            format!(
                "#[path = {:?}]\npub mod {name};\n",
                file.display().to_string()
            )
        })
        .collect();
    std::fs::write(out.join("modules.rs"), modules).expect("OUT_DIR can be written");
}
