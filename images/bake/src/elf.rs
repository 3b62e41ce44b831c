//! ELF files as far as a bake needs them: what a kernel module says of itself (the `.modinfo`
//! section), and a program without what nobody needs to run it.
//!
//! Files come from where a person said, so nothing in them is trusted.

/// A module's statements, such as `("depends", "vsock,virtio_ring")`.
pub(crate) fn module_info(elf: &[u8]) -> Option<Vec<(String, String)>> {
    let section = section(elf, b".modinfo")?;
    let statements = section.split(|byte| *byte == 0).filter_map(|text| {
        let (key, value) = std::str::from_utf8(text).ok()?.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    });
    Some(statements.collect())
}

fn bytes<const N: usize>(elf: &[u8], at: usize) -> Option<[u8; N]> {
    elf.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn half(elf: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(bytes(elf, at)?).into())
}

fn word(elf: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes(elf, at)?)).ok()
}

fn long(elf: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes(elf, at)?)).ok()
}

/// The content of a section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    if bytes(elf, 0)? != *b"\x7fELF\x02\x01" {
        return None;
    }
    let table = long(elf, 0x28)?;
    let (size, count, names) = (half(elf, 0x3a)?, half(elf, 0x3c)?, half(elf, 0x3e)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let content = |index: usize| {
        let header = header(index)?;
        let start = long(elf, header.checked_add(0x18)?)?;
        elf.get(start..start.checked_add(long(elf, header.checked_add(0x20)?)?)?)
    };
    let strings = content(names)?;
    for index in 0..count {
        let text = strings.get(word(elf, header(index)?)?..)?;
        if text
            .strip_prefix(name)
            .is_some_and(|rest| rest.first() == Some(&0))
        {
            return content(index);
        }
    }
    None
}

/// A program without its sections and whatever else lies behind what is loaded to run it, such as
/// symbols and debugging information: in a guest it would take memory, and nobody could use it.
///
/// What is no 64-bit little-endian program is returned as it is.
pub(crate) fn stripped(mut elf: Vec<u8>) -> Vec<u8> {
    if let Some(end) = end_of_loaded(&elf) {
        elf.truncate(end);
        // Where the sections are, how many, and which has their names: there are none.
        for range in [0x28..0x30, 0x3c..0x40] {
            if let Some(field) = elf.get_mut(range) {
                field.fill(0);
            }
        }
    }
    elf
}

/// The end of the last byte that a program header names.
fn end_of_loaded(elf: &[u8]) -> Option<usize> {
    if bytes(elf, 0)? != *b"\x7fELF\x02\x01" {
        return None;
    }
    let table = long(elf, 0x20)?;
    let (size, count) = (half(elf, 0x36)?, half(elf, 0x38)?);
    let mut end = table.checked_add(size.checked_mul(count)?)?.max(0x40);
    for index in 0..count {
        let header = table.checked_add(index.checked_mul(size)?)?;
        let start = long(elf, header.checked_add(0x8)?)?;
        end = end.max(start.checked_add(long(elf, header.checked_add(0x20)?)?)?);
    }
    (count > 0 && end <= elf.len()).then_some(end)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    #[test]
    fn stripped_program_is_smaller_and_still_runs() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let whole = own.len();
        let small = stripped(own);
        assert!(small.len() < whole / 2, "{} of {whole}", small.len());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        std::fs::write(&path, &small).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let run = || Command::new(&path).arg("--list").output();
        let mut output = run();
        // Another test's fork may still have the file open for writing.
        while matches!(&output, Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy) {
            std::thread::sleep(std::time::Duration::from_millis(5));
            output = run();
        }
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        assert!(text.contains("stripped_program_is_smaller"), "{text}");
        assert_eq!(stripped(small.clone()), small);
    }

    #[test]
    fn what_is_no_program_is_left_as_it_is() {
        for file in [b"".to_vec(), b"#!/bin/sh\n".to_vec(), module(&["a=b"])] {
            assert_eq!(stripped(file.clone()), file);
        }
    }

    /// The smallest ELF file with a `.modinfo` section.
    pub(crate) fn module(statements: &[&str]) -> Vec<u8> {
        let mut info = Vec::new();
        for statement in statements {
            info.extend(statement.as_bytes());
            info.push(0);
        }
        let strings = b"\0.modinfo\0.shstrtab\0";
        let mut elf = vec![0u8; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let info_at = elf.len();
        elf.extend(&info);
        let strings_at = elf.len();
        elf.extend(strings);
        let table = elf.len();
        for (name, at, length) in [
            (0u32, 0usize, 0usize),
            (1, info_at, info.len()),
            (10, strings_at, strings.len()),
        ] {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            elf.extend(header);
        }
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        for (at, value) in [(0x3a, 64u16), (0x3c, 3), (0x3e, 2)] {
            elf[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        elf
    }

    #[test]
    fn statements_are_read_in_order() {
        let info = module_info(&module(&["license=GPL", "depends=a,b", "parm=x:y=z"])).unwrap();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let expected = [
            pair("license", "GPL"),
            pair("depends", "a,b"),
            pair("parm", "x:y=z"),
        ];
        assert_eq!(info, expected);
    }

    #[test]
    fn what_is_no_module_is_refused() {
        assert_eq!(module_info(b""), None);
        assert_eq!(module_info(&[0x7f; 100]), None);
        let module = module(&["license=GPL"]);
        for cut in 0..module.len() {
            let _ = module_info(&module[..cut]);
        }
    }

    proptest! {
        #[test]
        fn no_damage_makes_it_panic(at in 0usize..300, byte in any::<u8>(), second in 0usize..64) {
            let mut elf = module(&["license=GPL", "depends="]);
            let length = elf.len();
            elf[at % length] = byte;
            elf[second] = byte;
            let _ = module_info(&elf);
        }
    }
}
