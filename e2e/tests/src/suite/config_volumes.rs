//! Volumes that the kubelet writes for containers to read: config maps, secrets and the like.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::node::{busybox, text};
use kiln_e2e::{ContainerSpec, Test, cases, wait};

use super::kubelet::Folder;
use super::same;

/// How soon a change is seen.
const SEEN: Duration = Duration::from_secs(10);

pub(crate) fn cases() -> Vec<Case> {
    cases![
        config_map_update_is_seen_atomically,
        program_that_watches_a_config_map_is_told_of_its_update,
        secret_has_its_owners_and_cannot_be_written,
        part_of_a_config_map_stays_what_it_was,
    ]
}

/// A volume as the kubelet writes one: `..data` links to a dated directory, the files are links through it; an update makes
/// a new directory and renames a new link over the old one.
struct Written {
    top: PathBuf,
    version: u32,
}

impl Written {
    fn make(folder: &Folder, kind: &str) -> Result<Self> {
        let top = folder.directory(kind, "config")?;
        Ok(Self { top, version: 0 })
    }

    /// The same on a plain directory of the node, which is no volume of the pod's.
    fn plain(test: &Test) -> Result<Self> {
        let top = test.scratch().join("config");
        fs::create_dir(&top)?;
        Ok(Self { top, version: 0 })
    }

    /// Writes the next version: in each file its number.
    fn publish(&mut self, names: &[&str]) -> Result<u32> {
        self.version += 1;
        let dated = format!("..version_{}", self.version);
        fs::create_dir(self.top.join(&dated))?;
        for name in names {
            fs::write(
                self.top.join(&dated).join(name),
                format!("{}\n", self.version),
            )?;
        }
        symlink(&dated, self.top.join("..data_tmp"))?;
        fs::rename(self.top.join("..data_tmp"), self.top.join("..data"))?;
        for name in names {
            let link = self.top.join(name);
            if fs::symlink_metadata(&link).is_err() {
                symlink(format!("..data/{name}"), link)?;
            }
        }
        for entry in fs::read_dir(&self.top)? {
            let entry = entry?;
            let name = entry.file_name().display().to_string();
            if name.starts_with("..version_") && name != dated {
                fs::remove_dir_all(entry.path())?;
            } else if !name.starts_with("..") && !names.contains(&&*name) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(self.version)
    }
}

async fn config_map_update_is_seen_atomically(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let pod = folder.pod(&test).await?;
    for mut volume in [
        Written::make(&folder, "kubernetes.io~configmap")?,
        Written::plain(&test)?,
    ] {
        volume.publish(&["one", "two"])?;
        let name = format!(
            "main-{}",
            volume.top.starts_with(test.scratch().join("pods"))
        );
        let spec = ContainerSpec::pause(&name).mount_read_only(&volume.top, "/config");
        let container = pod.start(&spec).await?;
        same!(
            container
                .read(&["cat", "/config/one", "/config/two"])
                .await?,
            "1\n1"
        );
        for names in [
            &["one", "two"][..],
            &["one", "two", "three"],
            &["one", "two"],
        ] {
            let version = volume.publish(names)?;
            let what = format!("version {version} in the container");
            wait::until(&what, SEEN, || async {
                // The files are read through one directory, so they are of one version.
                let seen = container
                    .exec(&["sh", "-c", "cd /config/..data/ && cat one two"])
                    .await?;
                let seen: Vec<&str> = seen.stdout.split_whitespace().collect();
                ensure!(seen.len() < 2 || seen[0] == seen[1], "a mixture: {seen:?}");
                let listed = container.read(&["ls", "/config"]).await?;
                let all = listed.lines().count() == names.len();
                Ok((all && seen.first() == Some(&&*version.to_string())).then_some(()))
            })
            .await?;
        }
    }
    Ok(())
}

async fn program_that_watches_a_config_map_is_told_of_its_update(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let mut volume = Written::make(&folder, "kubernetes.io~projected")?;
    volume.publish(&["token"])?;
    let pod = folder.pod(&test).await?;
    let spec = ContainerSpec::testprog("main", &["watch", "/config"]);
    let container = pod
        .start(&spec.mount_read_only(&volume.top, "/config"))
        .await?;
    container.log().wait_for("watching", SEEN).await?;
    volume.publish(&["token"])?;
    container.log().wait_for("..data", SEEN).await?;
    same!(container.read(&["cat", "/config/token"]).await?, "2");
    Ok(())
}

async fn secret_has_its_owners_and_cannot_be_written(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let mut volume = Written::make(&folder, "kubernetes.io~secret")?;
    volume.publish(&["password"])?;
    let dated = volume.top.join("..version_1");
    let of_group = |path: &Path, mode: u32| -> Result<()> {
        chown(path, None, Some(2000))?;
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(())
    };
    of_group(&volume.top, 0o3777)?;
    of_group(&dated, 0o2755)?;
    of_group(&dated.join("password"), 0o440)?;
    let pod = folder.pod(&test).await?;
    let spec = |name: &str, groups: &[i64]| {
        let spec = ContainerSpec::pause(name).user(1234, 1234).groups(groups);
        spec.mount_read_only(&volume.top, "/secret")
    };
    let member = pod.start(&spec("member", &[2000])).await?;
    let stat = [
        "stat",
        "-L",
        "-c",
        "%a %u %g",
        "/secret",
        "/secret/password",
    ];
    same!(member.read(&stat).await?, "3777 0 2000\n440 0 2000");
    same!(member.read(&["cat", "/secret/password"]).await?, "1");
    let stranger = pod.start(&spec("stranger", &[])).await?;
    ensure!(stranger.exec(&["cat", "/secret/password"]).await?.code != 0);
    let root = ContainerSpec::pause("root").mount_read_only(&volume.top, "/secret");
    let root = pod.start(&root).await?;
    for script in [
        "touch /secret/new",
        "rm /secret/password",
        "echo x > /secret/..data/password",
    ] {
        let done = root.exec(&["sh", "-c", script]).await?;
        ensure!(done.code != 0, "allowed: {script}");
    }
    same!(fs::read_to_string(dated.join("password"))?, "1\n");
    Ok(())
}

/// `subPath`: it is bound once, and not followed.
async fn part_of_a_config_map_stays_what_it_was(test: Test) -> Result<()> {
    let folder = Folder::make(&test)?;
    let mut volume = Written::make(&folder, "kubernetes.io~configmap")?;
    volume.publish(&["key"])?;
    let place = folder.parts("config")?.join("0");
    fs::write(&place, "")?;
    let bound = text(&volume.top.join("..version_1/key"));
    busybox(&["mount", "--bind", &bound, &text(&place)])?;
    let run = async {
        let pod = folder.pod(&test).await?;
        let spec = ContainerSpec::pause("main").mount_read_only(&place, "/key");
        let container = pod
            .start(&spec.mount_read_only(&volume.top, "/config"))
            .await?;
        volume.publish(&["key"])?;
        wait::until("the update", SEEN, || async {
            let seen = container.read(&["cat", "/config/key"]).await?;
            Ok((seen == "2").then_some(()))
        })
        .await?;
        same!(container.read(&["cat", "/key"]).await?, "1");
        Ok(())
    };
    let result = run.await;
    busybox(&["umount", "-l", &text(&place)])?;
    result
}
