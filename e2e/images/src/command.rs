//! Running the host's programs.

use std::process::{Command, Stdio};

use crate::{Error, Result};

/// So much of what a program said is worth repeating.
const LAST_LINES: usize = 15;

/// Runs a program to its end and gives what it wrote to stdout. If it fails, the error says its last lines and
/// `remedy`.
pub(crate) fn run(command: &mut Command, remedy: &'static str) -> Result<Vec<u8>> {
    run_with(command, Stdio::null(), remedy)
}

/// The same with something to read from stdin.
pub(crate) fn run_with(
    command: &mut Command,
    input: Stdio,
    remedy: &'static str,
) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(input)
        .output()
        .map_err(|source| Error::Start {
            program: program.clone(),
            remedy,
            source,
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(Error::Failed {
        program,
        status: output.status,
        remedy,
        said: last_lines(&said),
    })
}

fn last_lines(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_the_programs_last_words_and_the_remedy() {
        let script = "seq 100; echo why >&2; exit 3";
        let error = run(Command::new("sh").args(["-c", script]), "mend it").unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("sh failed (exit status: 3): mend it"),
            "{text}"
        );
        assert!(text.ends_with("99\n100\nwhy"), "{text}");
        assert!(!text.contains("\n80\n"), "{text}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_the_remedy() {
        let error = run(&mut Command::new("kiln-no-such"), "install it").unwrap_err();
        assert_eq!(error.to_string(), "cannot run kiln-no-such: install it");
    }

    #[test]
    fn what_it_wrote_comes_back() {
        assert_eq!(run(Command::new("echo").arg("x"), "").unwrap(), b"x\n");
    }
}
