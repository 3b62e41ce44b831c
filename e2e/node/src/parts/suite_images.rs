//! The part that serves the images of Kubernetes' suites.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use kiln_test_images::suites::{self, Sources};

use super::go::{GoModule, Program};
use super::{KUBERNETES_MODULE, Recipe, Workshop};
use crate::cache;

/// Where a node has the part.
const SEEN_AS: &str = "/opt/parts/suite-images";

/// The one program in the images that is the suites' own.
static AGNHOST: GoModule = GoModule {
    programs: &[Program::new("agnhost", "/test/images/agnhost")],
    ..KUBERNETES_MODULE
};

#[derive(Debug)]
pub(super) struct SuiteImages;

impl Recipe for SuiteImages {
    fn key(&self) -> Result<Vec<u8>> {
        let mut key = suites::recipe().into_bytes();
        key.extend(AGNHOST.key()?);
        // Without it there is a key all the same, and nothing to write.
        let program = fs::read(testprog()?).unwrap_or_default();
        key.extend(blake3::hash(&program).as_bytes());
        Ok(key)
    }

    fn write(&self, workshop: &Workshop) -> Result<()> {
        eprintln!(
            "node: making the suites' images: minutes, or seconds if busybox and a Debian are in the cache"
        );
        let of_agnhost = workshop.within("agnhost")?;
        AGNHOST.write(&of_agnhost)?;
        let sources = Sources {
            testprog: testprog()?,
            agnhost: of_agnhost.content.join("bin/agnhost"),
            porter: AGNHOST
                .source(&of_agnhost)?
                .join("test/images/agnhost/porter"),
        };
        let kept = cache::folder()?.join("suite-images");
        suites::make(&sources, &kept, &workshop.content, SEEN_AS)?;
        Ok(())
    }
}

/// What runs in images of ours lies beside this program, as the node's init does.
fn testprog() -> Result<PathBuf> {
    let here = std::env::current_exe().context("finding this program's own file")?;
    Ok(here.with_file_name("kiln-testprog"))
}
