//! The guest's first and only file system of its own: the agent, and the modules it loads.

use crate::cpio::Archive;
use crate::modules::Module;

/// Where the agent looks for the list of modules to load.
const MODULE_LIST: &str = "etc/kiln/modules";

/// Builds the initramfs. The kernel runs `/init`, which is the agent.
pub fn build(agent: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut archive = Archive::new();
    for dir in [
        "dev",
        "etc",
        "etc/kiln",
        "lib",
        "lib/modules",
        "proc",
        "run",
        "sys",
    ] {
        archive.dir(dir, 0o755);
    }
    archive.dir("tmp", 0o1777);
    // The kernel opens it for PID 1 before anything is mounted.
    archive.char_device("dev/console", 0o600, 5, 1);
    archive.char_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, agent);
    let mut list = String::from("# Loaded in this order, once, before the bake.\n");
    for module in modules {
        let path = format!("lib/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.content);
        list += &format!("/{path}\n");
    }
    archive.file(MODULE_LIST, 0o644, list.as_bytes());
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(haystack: &[u8], needle: &[u8]) -> Option<usize> {
        haystack
            .windows(needle.len())
            .position(|window| window == needle)
    }

    #[test]
    fn modules_are_listed_in_the_order_they_came() {
        let module = |name: &str| Module {
            name: name.into(),
            path: format!("kernel/{name}.ko"),
            content: vec![1, 2, 3],
        };
        let image = build(b"agent", &[module("vsock"), module("abc")]);
        let list = b"/lib/modules/vsock.ko\n/lib/modules/abc.ko\n";
        assert!(position(&image, list).is_some());
        assert!(position(&image, b"init\0").is_some());
        assert!(position(&image, b"dev/console\0").is_some());
    }
}
