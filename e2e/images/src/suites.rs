//! The images that critest and Kubernetes' node tests pull, under the names that they have there.
//!
//! Each is made of what the suites look at and nothing else: one root of busybox, with a layer above it where an image
//! is to be told from others. Only `agnhost` has the suites' own program, and a Debian around it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::busybox::busybox;
use crate::catalog::{PAUSE, applets, pause, program};
use crate::image::fingerprint;
use crate::once::host;
use crate::registry::{self, Named};
use crate::{Compression, Error, Image, ImageBuilder, Layer, Result, debian};

const E2E: &str = "registry.k8s.io/e2e-test-images";
const CRI_TOOLS: &str = "gcr.io/k8s-staging-cri-tools";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Files that the images are made from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The program `kiln-testprog`.
    pub testprog: PathBuf,
    /// The program `agnhost`, static, of the suites' version.
    pub agnhost: PathBuf,
    /// The folder with the certificate that agnhost's `porter` serves: `test/images/agnhost/porter` of the module
    /// `k8s.io/kubernetes`.
    pub porter: PathBuf,
}

const TESTPROG_REMEDY: &str = "`make build` builds it";
const AGNHOST_REMEDY: &str = "the part node-tests has it";
const PORTER_REMEDY: &str = "Go's module k8s.io/kubernetes has it";

/// What was read of [`Sources`].
struct Programs {
    testprog: Vec<u8>,
    agnhost: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Sources {
    fn read(&self) -> Result<Programs> {
        let porter = |file: &str| program(&self.porter.join(file), PORTER_REMEDY);
        Ok(Programs {
            testprog: program(&self.testprog, TESTPROG_REMEDY)?,
            agnhost: program(&self.agnhost, AGNHOST_REMEDY)?,
            certificate: porter("localhost.crt")?,
            key: porter("localhost.key")?,
        })
    }
}

/// Another name than before if [`make`] makes something else of the same files.
pub fn recipe() -> String {
    let code: [&[u8]; 6] = [
        include_bytes!("suites.rs"),
        include_bytes!("busybox.rs"),
        include_bytes!("debian.rs"),
        include_bytes!("image.rs"),
        include_bytes!("layer.rs"),
        include_bytes!("registry.rs"),
    ];
    fingerprint(code)
}

/// Makes what serves the suites' images into the empty folder `out`, which the node will have as `seen_as`: `registry`
/// (what the registry serves), `registry.yml` and `hosts.toml` (see [`registry`]). What takes minutes to make on the
/// way is kept in `cache`.
pub fn make(sources: &Sources, cache: &Path, out: &Path, seen_as: &str) -> Result<()> {
    let busybox = busybox(cache)?;
    let debian = debian::root(cache)?;
    let images = images(&sources.read()?, &busybox, &debian)?;
    registry::write(&images, &out.join("registry"))?;
    let write = |name: &str, text: String| {
        let path = out.join(name);
        host("write", &path, std::fs::write(&path, text))
    };
    write(
        "registry.yml",
        registry::configuration(&format!("{seen_as}/registry")),
    )?;
    write("hosts.toml", registry::hosts())
}

/// All images.
fn images(programs: &Programs, busybox: &Path, debian: &Path) -> Result<Vec<Named>> {
    let base = root(
        &program(busybox, "it was made just now")?,
        &applets(busybox)?,
    );
    let mut images = pauses(&programs.testprog)?;
    images.extend(plain(&base)?);
    images.extend(servers(&base)?);
    images.extend(users(&base)?);
    images.push(nonewprivs(&base, &programs.testprog)?);
    images.push(agnhost(programs, busybox, debian)?);
    Ok(images)
}

fn named(repository: &str, tags: &[&str], image: Image) -> Named {
    let names = tags.iter().map(|tag| format!("{repository}:{tag}"));
    Named {
        names: names.collect(),
        image,
    }
}

/// The root file system of all images but the pause images and agnhost.
fn root(busybox: &[u8], applets: &[String]) -> Layer {
    let mut layer = Layer::new()
        .compressed(Compression::Gzip)
        .file("bin/busybox", busybox, 0o755)
        .symlink("sbin", "bin")
        .symlink("usr/bin", "../bin")
        .symlink("usr/sbin", "../bin")
        .file("etc/passwd", USERS, 0o644)
        .file("etc/group", GROUPS, 0o644)
        .file("etc/shadow", "root:*:19000:0:99999:7:::\n", 0o640)
        .file("etc/nsswitch.conf", "hosts: files dns\n", 0o644)
        .dir("root", 0o700)
        .dir("tmp", 0o1777)
        .dir("var/tmp", 0o1777)
        .dir("var/www", 0o755)
        .dir("var/run", 0o755);
    for folder in ["dev", "home", "proc", "run", "sys"] {
        layer = layer.dir(folder, 0o755);
    }
    // Hard links, as the original has them: what a program is called stays what /proc shows.
    for applet in applets {
        layer = layer.hardlink(&format!("bin/{applet}"), "bin/busybox");
    }
    layer
}

const USERS: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
sys:x:3:3:sys:/dev:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";
const GROUPS: &str = "\
root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
wheel:x:10:root
www-data:x:33:
operator:x:37:
users:x:100:
nogroup:x:65534:
";

fn on(base: &Layer) -> ImageBuilder {
    ImageBuilder::new().layer(base.clone()).env("PATH", PATH)
}

/// A layer above the root that makes an image another one.
fn mark(text: &str) -> Layer {
    Layer::new()
        .compressed(Compression::Gzip)
        .file("etc/image", format!("{text}\n"), 0o644)
}

/// The sandbox images; also the one that the node's other tests have, since containerd is configured for it.
fn pauses(testprog: &[u8]) -> Result<Vec<Named>> {
    let program = Layer::new()
        .compressed(Compression::Gzip)
        .file("pause", testprog, 0o755);
    let image = ImageBuilder::new()
        .layer(program)
        .entrypoint(&["/pause"])
        .user("65535:65535");
    let pauses = "registry.k8s.io/pause";
    // critest wants an image that has two names of two registries, and no third.
    let mut two = named(
        pauses,
        &["3.9"],
        image.clone().label("version", "3.9").build()?,
    );
    two.names.push("k8s.gcr.io/pause:3.9".to_owned());
    let ours = Named {
        names: vec![PAUSE.to_owned()],
        image: pause(testprog)?,
    };
    let tags = ["3.8", "3.10", "3.10.1", "3.10.2"];
    Ok(vec![named(pauses, &tags, image.build()?), two, ours])
}

/// Images that run a shell, and those that only have to be pulled, listed and told apart.
fn plain(base: &Layer) -> Result<Vec<Named>> {
    let shell = on(base).command(&["sh"]).build()?;
    let mut images = vec![
        named(&format!("{E2E}/busybox"), &["1.29-2", "1.37.0-2"], shell),
        named(
            &format!("{E2E}/nonroot"),
            &["1.5"],
            on(base).command(&["sh"]).user("1234").build()?,
        ),
    ];
    for (name, tags) in [
        ("latest", &["latest"][..]),
        ("tag", &["test", "all"]),
        ("digest", &["test"]),
        ("1", &["latest"]),
        ("2", &["latest"]),
        ("3", &["latest"]),
        ("tags", &["1", "2", "3"]),
    ] {
        let image = on(base).layer(mark(name)).command(&["sh"]).build()?;
        images.push(named(
            &format!("{CRI_TOOLS}/test-image-{name}"),
            tags,
            image,
        ));
    }
    Ok(images)
}

/// Images with a user of their own.
fn users(base: &Layer) -> Result<Vec<Named>> {
    let image = |name: &str, image: Image| {
        named(
            &format!("{CRI_TOOLS}/test-image-{name}"),
            &["latest"],
            image,
        )
    };
    let mut images = Vec::new();
    for (name, user) in [
        ("user-uid", "1002"),
        ("user-username", "www-data"),
        ("user-uid-group", "1003:1002"),
        ("user-username-group", "www-data:www-data"),
    ] {
        images.push(image(name, on(base).command(&["sh"]).user(user).build()?));
    }
    let user = "default-user:x:1000:1000::/home/default-user:/bin/sh\n";
    let groups = "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n";
    let layer = Layer::new()
        .compressed(Compression::Gzip)
        .file("etc/passwd", format!("{USERS}{user}"), 0o644)
        .file("etc/group", format!("{GROUPS}{groups}"), 0o644);
    let predefined = on(base).layer(layer).command(&["sh"]).user("1000");
    images.push(image("predefined-group", predefined.build()?));
    Ok(images)
}

/// What stands in for a web server: a process of its name, a file with its id, and a page.
fn server(base: &Layer, name: &str, port: u16) -> Result<Image> {
    let script = format!(
        "\
#!/bin/sh
echo $$ > /var/run/nginx.pid
trap 'kill $server; exit 0' TERM INT QUIT
busybox httpd -f -p {port} -h /srv &
server=$!
echo \"{name}: start worker processes\"
wait $server
"
    );
    let page = "<!DOCTYPE html><html><head><title>Welcome to nginx!</title></head><body><h1>It works!</h1></body></html>\n";
    let program = format!("usr/local/bin/{name}");
    let layer = Layer::new()
        .compressed(Compression::Gzip)
        .file(&program, script, 0o755)
        .file("srv/index.html", page, 0o644);
    // critest looks for these arguments in the list of processes.
    on(base)
        .layer(layer)
        .entrypoint(&[&format!("/{program}"), "master process"])
        .build()
}

fn servers(base: &Layer) -> Result<Vec<Named>> {
    let nginx = server(base, "nginx", 80)?;
    let tags = ["1.14-2", "1.27.0-2", "1.28.0-2"];
    let httpd = server(base, "httpd-foreground", 80)?;
    let host_port = server(base, "nginx", 12003)?;
    let on_host = format!("{CRI_TOOLS}/hostnet-nginx-{}", crate::image::architecture());
    Ok(vec![
        named(&format!("{E2E}/nginx"), &tags, nginx),
        named(&format!("{E2E}/httpd"), &["2.4.39-4"], httpd),
        named(&on_host, &["latest"], host_port),
    ])
}

/// A program that says who it runs as, with the bits that let it run as root.
fn nonewprivs(base: &Layer, testprog: &[u8]) -> Result<Named> {
    let layer = Layer::new().compressed(Compression::Gzip).file(
        "usr/local/bin/nonewprivs",
        testprog,
        0o6755,
    );
    let image = on(base).layer(layer).command(&["nonewprivs"]).build()?;
    Ok(named(&format!("{E2E}/nonewprivs"), &["1.3", "1.4"], image))
}

/// agnhost on Debian; what Debian leaves to busybox elsewhere is there too, where the path looks first.
fn agnhost(programs: &Programs, busybox: &Path, debian: &Path) -> Result<Named> {
    let debian = program(debian, "it was made just now")?;
    let there = file_names(&debian)?;
    let mut tools = Layer::new().compressed(Compression::Gzip).file(
        "usr/local/bin/busybox",
        program(busybox, "it was made just now")?,
        0o755,
    );
    for applet in applets(busybox)? {
        if !there.contains(&applet) {
            tools = tools.symlink(&format!("usr/local/bin/{applet}"), "busybox");
        }
    }
    for folder in ["dev", "proc", "sys"] {
        tools = tools.dir(folder, 0o755);
    }
    let own = Layer::new()
        .compressed(Compression::Zstd)
        .file("agnhost", &programs.agnhost[..], 0o755)
        .symlink("agnhost-2", "agnhost")
        .file("localhost.crt", &programs.certificate[..], 0o644)
        .file("localhost.key", &programs.key[..], 0o644)
        .dir("uploads", 0o755);
    let image = ImageBuilder::new()
        .archive(debian, Compression::Zstd)
        .layer(tools)
        .layer(own)
        .env("PATH", PATH)
        .entrypoint(&["/agnhost"])
        .command(&["pause"])
        .build()?;
    Ok(named(&format!("{E2E}/agnhost"), &["2.55", "2.66.1"], image))
}

/// The last parts of all paths in a tar.
fn file_names(tar: &[u8]) -> Result<BTreeSet<String>> {
    let failed = |source| Error::Write {
        what: "a layer of Debian's root",
        source,
    };
    let mut names = BTreeSet::new();
    for entry in tar::Archive::new(tar).entries().map_err(failed)? {
        let path = entry.map_err(failed)?.path().map_err(failed)?.into_owned();
        if let Some(name) = path.file_name() {
            names.insert(name.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
