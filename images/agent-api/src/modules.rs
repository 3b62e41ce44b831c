//! A library of kernel modules: a file that the host shows the guest, from which modules are loaded when something needs
//! them. So they take no memory in a μVM before, and no μVM has a copy of them.
//!
//! The file is a line with the index' length, the index, and the modules' files one after the other, as the kernel's
//! package has them. The index is lines of text: `module NAME OFFSET LENGTH NEEDED…`, where an offset counts from the index'
//! end, and `alias PATTERN NAME`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write};

/// The library's name in the directory that host and guest share.
pub const LIBRARY: &str = "modules";

const MAGIC: &str = "kiln-modules-1";
/// The first line: the magic, a space, ten digits, a newline.
const FIRST_LINE: usize = MAGIC.len() + 12;
/// No index comes near this.
const LONGEST_INDEX: u64 = 16 << 20;

/// A module to be put into a library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name, with underscores.
    pub name: String,
    /// The modules it needs, by name.
    pub needs: Vec<String>,
    /// What it is asked for by, beside its name. `*` and `?` are wildcards.
    pub aliases: Vec<String>,
    /// Its file.
    pub content: Vec<u8>,
}

/// Writes a library.
pub fn write(entries: &[Entry], out: &mut impl Write) -> io::Result<()> {
    let mut index = String::new();
    let mut offset = 0;
    for entry in entries {
        let needs = entry.needs.join(" ");
        let length = entry.content.len();
        // Writing to a string can't fail.
        let _ = writeln!(index, "module {} {offset} {length} {needs}", entry.name);
        for alias in &entry.aliases {
            let _ = writeln!(index, "alias {alias} {}", entry.name);
        }
        offset += length;
    }
    writeln!(out, "{MAGIC} {:010}", index.len())?;
    out.write_all(index.as_bytes())?;
    for entry in entries {
        out.write_all(&entry.content)?;
    }
    Ok(())
}

/// Where a module's file is in a library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The module's name.
    pub name: String,
    /// Where its file begins.
    pub offset: u64,
    /// How long that is.
    pub length: u64,
}

/// What a library has.
#[derive(Debug, Default)]
pub struct Index {
    modules: BTreeMap<String, (Place, Vec<String>)>,
    aliases: Vec<(String, String)>,
}

impl Index {
    /// Reads the index of a library by `read`, which fills a buffer from an offset of the file.
    pub fn read(mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> io::Result<Self> {
        let damaged = |what: &str| {
            let text = format!("the library of kernel modules is damaged: {what}; bake again");
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let mut first = [0; FIRST_LINE];
        read(&mut first, 0)?;
        let length = std::str::from_utf8(&first)
            .ok()
            .and_then(|line| line.strip_prefix(MAGIC)?.trim().parse::<u64>().ok())
            .filter(|length| *length <= LONGEST_INDEX)
            .ok_or_else(|| damaged("its first line"))?;
        let mut text = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        read(&mut text, FIRST_LINE as u64)?;
        let text = String::from_utf8(text).map_err(|_| damaged("its index is no text"))?;
        let start = FIRST_LINE as u64 + length;
        let mut index = Index::default();
        for line in text.lines() {
            index
                .line(line, start)
                .ok_or_else(|| damaged(&format!("the line {line:?}")))?;
        }
        Ok(index)
    }

    fn line(&mut self, line: &str, start: u64) -> Option<()> {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        match words.next()? {
            "module" => {
                let name = words.next()?.to_owned();
                let offset = words.next()?.parse::<u64>().ok()?.checked_add(start)?;
                let length = words.next()?.parse().ok()?;
                let needs = words.map(str::to_owned).collect();
                let place = Place {
                    name: name.clone(),
                    offset,
                    length,
                };
                self.modules.insert(name, (place, needs));
            }
            "alias" => {
                let pattern = words.next()?.to_owned();
                self.aliases.push((pattern, words.next()?.to_owned()));
            }
            _ => return None,
        }
        Some(())
    }

    /// The modules that are meant by a name or an alias, after those that they need; those that are needed and not here
    /// are part of the kernel or loaded.
    pub fn find(&self, asked: &str) -> Vec<&Place> {
        let asked = plain(asked);
        let mut names: Vec<&str> = match self.modules.get_key_value(&asked) {
            Some((name, _)) => vec![name],
            None => Vec::new(),
        };
        if names.is_empty() {
            let meant = self.aliases.iter();
            names = meant
                .filter(|(pattern, _)| matches(plain(pattern).as_bytes(), asked.as_bytes()))
                .map(|(_, name)| name.as_str())
                .collect();
        }
        let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
        for name in names {
            self.visit(name, &mut seen, &mut order);
        }
        order
    }

    fn visit<'a>(&'a self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<&'a Place>) {
        // One that is on the way already is a circle, which the kernel would refuse.
        if !seen.insert(name.to_owned()) {
            return;
        }
        if let Some((place, needs)) = self.modules.get(name) {
            for need in needs {
                self.visit(need, seen, order);
            }
            order.push(place);
        }
    }
}

/// Modules' names have dashes here and underscores there.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// Whether a text is what a pattern says.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            (0..=text.len()).any(|skipped| matches(rest, text.get(skipped..).unwrap_or_default()))
        }
        (Some((b'?', pattern)), Some((_, text))) => matches(pattern, text),
        (Some((one, pattern)), Some((other, text))) => one == other && matches(pattern, text),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, needs: &[&str], aliases: &[&str]) -> Entry {
        let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Entry {
            name: name.to_owned(),
            needs: list(needs),
            aliases: list(aliases),
            content: format!("the file of {name}").into_bytes(),
        }
    }

    fn library() -> Vec<u8> {
        let mut file = Vec::new();
        let entries = [
            entry("llc", &[], &[]),
            entry("stp", &["llc"], &[]),
            entry("bridge", &["stp", "llc"], &["rtnl-link-bridge"]),
            entry("a_round", &["b_round"], &["char-major-10-*"]),
            entry("b_round", &["a_round"], &["net-pf-?-proto-132"]),
        ];
        write(&entries, &mut file).unwrap();
        file
    }

    fn read(file: &[u8]) -> io::Result<Index> {
        Index::read(|buffer, at| {
            let rest = file.get(usize::try_from(at).unwrap()..).unwrap_or_default();
            let part = rest.get(..buffer.len());
            buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn names(index: &Index, asked: &str) -> Vec<String> {
        let found = index.find(asked).into_iter();
        found.map(|place| place.name.clone()).collect()
    }

    #[test]
    fn a_module_comes_after_what_it_needs_by_name_and_by_alias() {
        let file = library();
        let index = read(&file).unwrap();
        for asked in ["bridge", "rtnl-link-bridge"] {
            assert_eq!(names(&index, asked), ["llc", "stp", "bridge"]);
        }
        let found = index.find("stp");
        let place = found.last().unwrap();
        let start = usize::try_from(place.offset).unwrap();
        let content = &file[start..start + usize::try_from(place.length).unwrap()];
        assert_eq!(content, b"the file of stp");
        assert_eq!(names(&index, "nothing"), Vec::<String>::new());
    }

    #[test]
    fn patterns_and_circles_end() {
        let index = read(&library()).unwrap();
        assert_eq!(names(&index, "char-major-10-229"), ["b_round", "a_round"]);
        assert_eq!(names(&index, "net-pf-2-proto-132"), ["a_round", "b_round"]);
        assert_eq!(names(&index, "net-pf-10-proto-132"), Vec::<String>::new());
    }

    #[test]
    fn what_is_no_library_is_an_error() {
        let mut file = library();
        assert!(read(&file[..20]).is_err());
        file[FIRST_LINE] = b'x';
        assert!(read(&file).unwrap_err().to_string().contains("bake again"));
        assert!(read(b"kiln-modules-1 9999999999\n").is_err());
    }
}
