//! `testprog`: the program inside the tests' containers.
//!
//! One static file that does what a test wants to see done from inside (use memory and CPU, write
//! files, serve HTTP, catch signals) and tells what it sees there as JSON. It trusts nothing but
//! its arguments and needs nothing from the image around it.

mod churn;
mod count;
mod features;
mod files;
mod grpc;
mod guest;
mod hostile;
mod http;
mod job;
mod json;
mod kernel;
mod load;
mod process;
mod report;
mod signals;
mod text;
mod udp;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
testprog COMMAND [ARGUMENTS]    (or COMMAND, if the program has that name)
  pause                      wait for TERM or INT, reaping orphans
  started                    print `started` and then pause
  nonewprivs                 print the effective user, which a set-user-id bit may have chosen
  report                     print what this process sees, as JSON
  fill MIB [STEP]            touch MIB of memory in steps, print each, hold it
  burn SECONDS [THREADS]     use CPU, then print what was used
  write PATH BYTES [SEED]    write pseudo-random bytes, fsync, print their SHA-256
  put PATH BYTES SEED        write pseudo-random bytes and fsync
  check PATH BYTES SEED      fail unless the file is what put wrote
  syncs DIR COUNT            append 4 KiB and fsync, so many times
  grow PATH MIB STEP         write MIB in steps, sync each, print the microseconds of each
  build DIR MIB              unpack a tree of sources, build it, sync now and then, delete it
  hash PATH...               print the SHA-256 of files
  opens PATH COUNT           open the file, read it and close it, so many times
  blocks PATH WHAT COUNT     read, write or sync (write and fsync) random 4 KiB of the file, so many times
  count FILE COUNT flock|fcntl    add one to the number in the file, so many times, each under a lock
  features DIR               try what programs do with files; print what does not work there, or `all`
  watch DIR                  print `watching`, then the names of what is moved into the directory
  timed COMMAND [ARGUMENT]...  run the command, print the microseconds that it took
  http PORT                  answer HTTP
  health PORT FILE           answer gRPC's health checks by whether the file is there
  get HOST:PORT PATH         GET, print the body; exit 22 unless the status is 200
  udp PORT                   answer each datagram with what it holds and who sent it
  ask HOST:PORT TEXT         send a datagram, repeat it each second, print the answer
  exit CODE                  exit
  signals [NAME=CODE|NAME=ignore]...  print signals as they come; exit with CODE where one is given
  lines COUNT [LENGTH] [ERR_EVERY]    print numbered lines, every n-th on stderr
  pace RATE COUNT [LENGTH]   print COUNT numbered lines, RATE a second, then the milliseconds on stderr
  churn FILE MIB             write 1, 2, 3, ... to the pages of the file in turn, as long as they hold what was written
  churned FILE               fail unless the file is as it was at one moment of that
  beat MS                    look at the clock each millisecond; print the most microseconds between two looks
  sctp                       open a socket of a protocol that kernels load when it is asked for
  echo                       copy stdin to stdout, then print the count on stderr
  tty                        print whether stdio is a terminal and its size; again after each resize
  spawn COUNT                start COUNT sleeping children, print their pids, pause
  orphan                     leave an orphaned child behind that ends at once
  sleep SECONDS              sleep (fractions allowed)
  swap DIR SECONDS TARGET... put links to the targets in the place of DIR's numbered entries
  scribble DIR NAME SECONDS  write to the file NAME of DIR's numbered entries
  locks DIR SECONDS          lock what can be opened below DIR
  guest PORT                 be a guest that runs the scripts that come over vsock";

fn main() -> ExitCode {
    match run(&command_line(std::env::args())) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("testprog: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The commands that images have as programs of their own, which are this program under other names.
const NAMES: [&str; 2] = ["pause", "nonewprivs"];

/// Command and arguments: the program's name comes first if it is a command's.
fn command_line(words: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut words = words.into_iter();
    let program = words.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    let command = NAMES.contains(&name).then(|| name.to_owned());
    command.into_iter().chain(words).collect()
}

fn run(arguments: &[String]) -> Result<ExitCode> {
    let Some((command, rest)) = arguments.split_first() else {
        bail!("no command given\n{USAGE}");
    };
    match command.as_str() {
        "pause" => return process::pause(),
        "started" => {
            text::say("started")?;
            return process::pause();
        }
        "nonewprivs" => text::say(&process::effective_user())?,
        "report" => text::say(&report::report().to_string())?,
        "fill" => load::fill(number(rest, 0)?, optional(rest, 1)?.unwrap_or(8))?,
        "burn" => load::burn(fraction(rest, 0)?, optional(rest, 1)?.unwrap_or(1))?,
        "write" => files::write(
            word(rest, 0)?,
            number(rest, 1)?,
            optional(rest, 2)?.unwrap_or(1),
        )?,
        "put" => files::put(word(rest, 0)?, number(rest, 1)?, number(rest, 2)?)?,
        "check" => files::check(word(rest, 0)?, number(rest, 1)?, number(rest, 2)?)?,
        "syncs" => job::syncs(word(rest, 0)?, number(rest, 1)?)?,
        "grow" => job::grow(word(rest, 0)?, number(rest, 1)?, number(rest, 2)?)?,
        "build" => job::build(word(rest, 0)?, number(rest, 1)?)?,
        "hash" => files::hash(rest)?,
        "opens" => files::opens(word(rest, 0)?, number(rest, 1)?)?,
        "blocks" => files::blocks(word(rest, 0)?, word(rest, 1)?, number(rest, 2)?)?,
        "count" => count::count(word(rest, 0)?, number(rest, 1)?, word(rest, 2)?)?,
        "churn" => churn::churn(word(rest, 0)?, number(rest, 1)?)?,
        "churned" => churn::churned(word(rest, 0)?)?,
        "beat" => churn::beat(number(rest, 0)?)?,
        "sctp" => kernel::sctp()?,
        "features" => features::try_all(word(rest, 0)?)?,
        "watch" => files::watch(word(rest, 0)?)?,
        "timed" => text::say(&process::timed(rest)?.to_string())?,
        "http" => http::serve(number(rest, 0)?)?,
        "health" => grpc::serve(number(rest, 0)?, word(rest, 1)?.as_ref())?,
        "get" => return http::get(word(rest, 0)?, word(rest, 1)?),
        "udp" => udp::serve(number(rest, 0)?)?,
        "ask" => udp::ask(word(rest, 0)?, word(rest, 1)?)?,
        "exit" => return Ok(ExitCode::from(number::<u8>(rest, 0)?)),
        "signals" => return signals::watch(rest),
        "lines" => text::lines(
            number(rest, 0)?,
            optional(rest, 1)?.unwrap_or(0),
            optional(rest, 2)?.unwrap_or(0),
        )?,
        "pace" => text::pace(
            number(rest, 0)?,
            number(rest, 1)?,
            optional(rest, 2)?.unwrap_or(0),
        )?,
        "echo" => text::echo()?,
        "tty" => return text::tty(),
        "spawn" => return process::spawn(number(rest, 0)?),
        "orphan" => process::orphan()?,
        "guest" => guest::serve(number(rest, 0)?)?,
        "swap" => hostile::swap(
            word(rest, 0)?.as_ref(),
            fraction(rest, 1)?,
            rest.get(2..).unwrap_or_default(),
        )?,
        "scribble" => {
            hostile::scribble(word(rest, 0)?.as_ref(), word(rest, 1)?, fraction(rest, 2)?)?;
        }
        "locks" => hostile::locks(word(rest, 0)?.as_ref(), fraction(rest, 1)?)?,
        "sleep" => std::thread::sleep(std::time::Duration::from_secs_f64(fraction(rest, 0)?)),
        "help" | "--help" | "-h" => text::say(USAGE)?,
        other => bail!("unknown command {other:?}\n{USAGE}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn word(arguments: &[String], index: usize) -> Result<&str> {
    arguments
        .get(index)
        .map(String::as_str)
        .with_context(|| format!("argument {} is missing\n{USAGE}", index + 1))
}

fn number<T: std::str::FromStr>(arguments: &[String], index: usize) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text = word(arguments, index)?;
    text.parse()
        .with_context(|| format!("{text:?} is not a number that fits here"))
}

fn optional<T: std::str::FromStr>(arguments: &[String], index: usize) -> Result<Option<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    if index < arguments.len() {
        number(arguments, index).map(Some)
    } else {
        Ok(None)
    }
}

fn fraction(arguments: &[String], index: usize) -> Result<f64> {
    let seconds: f64 = number(arguments, index)?;
    if !seconds.is_finite() || seconds < 0.0 {
        bail!("{seconds} is no length of time");
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_unknown_command_is_an_error_that_shows_the_usage() {
        for arguments in [
            vec![],
            vec!["frobnicate".to_owned()],
            vec!["exit".to_owned()],
        ] {
            let error = run(&arguments).unwrap_err();
            assert!(
                format!("{error:#}").contains("testprog COMMAND"),
                "{error:#}"
            );
        }
    }

    #[test]
    fn a_program_with_a_commands_name_is_that_command() {
        let split = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        for (line, meant) in [
            ("/bin/testprog exit 3", "exit 3"),
            ("./testprog pause", "pause"),
            ("/pause", "pause"),
            ("nonewprivs", "nonewprivs"),
        ] {
            assert_eq!(command_line(split(line)), split(meant), "{line}");
        }
        assert!(command_line(split("/bin/testprog")).is_empty());
        assert!(command_line([]).is_empty());
    }

    #[test]
    fn a_length_of_time_is_finite_and_not_negative() {
        for bad in ["-1", "inf", "NaN", "x"] {
            assert!(fraction(&[bad.to_owned()], 0).is_err(), "{bad}");
        }
        assert_eq!(fraction(&["0.25".to_owned()], 0).unwrap(), 0.25);
    }
}
