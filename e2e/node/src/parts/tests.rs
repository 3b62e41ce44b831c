use super::*;

/// Content of one file, written without any program.
struct Text(&'static str);

impl Recipe for Text {
    fn key(&self) -> Result<Vec<u8>> {
        Ok(self.0.into())
    }

    fn write(&self, workshop: &Workshop) -> Result<()> {
        fs::create_dir(workshop.content.join("bin"))?;
        fs::write(workshop.content.join("bin/text"), self.0)?;
        Ok(())
    }
}

struct Failing;

impl Recipe for Failing {
    fn key(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn write(&self, workshop: &Workshop) -> Result<()> {
        let script = "seq 100; echo 'no such module' >&2; exit 3";
        workshop.run(Command::new("sh").args(["-c", script]), "find the module")
    }
}

#[test]
fn names_are_what_the_command_line_takes_and_fit_a_serial_number() {
    for part in Part::value_variants() {
        let name = part.name();
        assert_eq!(Part::from_str(name, false), Ok(*part));
        assert!(name.len() <= 20, "{name}");
    }
}

#[test]
fn every_recipe_has_a_key_of_its_own() {
    let mut keys: Vec<_> = Part::value_variants()
        .iter()
        .map(|part| part.recipe().key().unwrap())
        .collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), Part::value_variants().len());
}

#[test]
fn a_part_is_an_erofs_disk_that_is_made_once() {
    let folder = tempfile::tempdir().unwrap();
    disk("text", &Text("one"), folder.path()).unwrap();
    let file = disk("text", &Text("one"), folder.path()).unwrap().file;
    let mut magic = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, 1024).unwrap();
    assert_eq!(u32::from_le_bytes(magic), 0xE0F5_E1E2);

    disk("text", &Text("two"), folder.path()).unwrap();
    let mut left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "text.lock")
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left.pop().unwrap().ends_with(".erofs"));
}

#[test]
fn a_build_that_fails_names_command_and_last_lines_and_remedy_and_is_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let error = disk("failing", &Failing, folder.path()).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.starts_with("sh -c 'seq 100;"), "{text}");
        assert!(
            text.contains("\n100\nno such module\nfind the module"),
            "{text}"
        );
        assert!(!text.contains("\n80\n"), "{text}");
        assert!(text.contains("failing.log"), "{text}");
    }
}
