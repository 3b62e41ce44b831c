//! What runs in the tests' containers: this very program, static, as `/bin/inside`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// Runs one command; the exit code is the process's.
pub(crate) fn run(arguments: &[String]) -> i32 {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match command(&words) {
        Ok(code) => code,
        Err(error) => {
            println!("error: {error}");
            error.raw_os_error().unwrap_or(1)
        }
    }
}

fn command(words: &[&str]) -> io::Result<i32> {
    match words {
        ["exit", code] => return Ok(code.parse().unwrap_or(99)),
        ["print", out, err] => {
            print!("{out}");
            eprint!("{err}");
        }
        ["status"] => print!("{}", fs::read_to_string("/proc/self/status")?),
        ["environment"] => {
            for (name, value) in std::env::vars() {
                println!("{name}={value}");
            }
        }
        ["where"] => println!("{}", std::env::current_dir()?.display()),
        ["host"] => print!("{}", fs::read_to_string("/proc/sys/kernel/hostname")?),
        ["cat", path] => print!("{}", fs::read_to_string(path)?),
        ["list", path] => {
            for entry in fs::read_dir(path)? {
                println!("{}", entry?.file_name().to_string_lossy());
            }
        }
        ["link", path] => println!("{}", fs::read_link(path)?.display()),
        ["owner", path] => {
            let file = fs::metadata(path)?;
            println!("{} {}", file.uid(), file.gid());
        }
        ["write", path, text] => fs::write(path, text)?,
        ["mkdir", path] => fs::create_dir(path)?,
        ["reopen"] => fs::OpenOptions::new()
            .write(true)
            .open("/dev/stdout")?
            .write_all(b"again\n")?,
        ["echo"] => {
            io::copy(&mut io::stdin(), &mut io::stdout())?;
        }
        ["lines", count] => lines(count.parse().unwrap_or(0))?,
        ["fill", mib] => fill(mib.parse().unwrap_or(0))?,
        ["burn", milliseconds] => burn(milliseconds.parse().unwrap_or(0)),
        ["spawn", count] => return spawn(count.parse().unwrap_or(0)),
        ["bomb"] => bomb(),
        ["terminal"] => terminal()?,
        ["serve", port] => serve(port.parse().unwrap_or(0))?,
        ["ask", port] => {
            let mut answer = String::new();
            let port: u16 = port.parse().unwrap_or(0);
            TcpStream::connect(("127.0.0.1", port))?.read_to_string(&mut answer)?;
            print!("{answer}");
        }
        ["pipe-signal"] => {
            // Ignored or not, as it was inherited: std has already set it to ignored for itself, so a
            // child with the default set by exec shows what the runtime left.
            print!("{}", fs::read_to_string("/proc/self/status")?);
        }
        ["sleep"] => std::thread::sleep(Duration::from_secs(3600)),
        _ => {
            println!("unknown: {words:?}");
            return Ok(98);
        }
    }
    io::stdout().flush()?;
    Ok(0)
}

fn lines(count: u32) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(4096, io::stdout().lock());
    for number in 0..count {
        writeln!(out, "line {number} of the output that must not be lost")?;
    }
    out.flush()
}

fn fill(mib: usize) -> io::Result<()> {
    let mut kept = Vec::new();
    for number in 0..mib {
        let mut block = vec![0_u8; 1 << 20];
        for page in block.chunks_mut(4096) {
            page[0] = number as u8 | 1;
        }
        kept.push(block);
    }
    println!(
        "filled {}",
        kept.iter().filter(|block| block[0] > 0).count()
    );
    Ok(())
}

fn burn(milliseconds: u64) {
    let start = Instant::now();
    let mut sum = 0_u64;
    while start.elapsed() < Duration::from_millis(milliseconds) {
        for number in 0..10_000_u64 {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(number));
        }
    }
}

fn spawn(count: u32) -> io::Result<i32> {
    let mut children = Vec::new();
    let mut failure = None;
    for _ in 0..count {
        match Command::new("/bin/inside")
            .args(["--inside", "sleep"])
            .spawn()
        {
            Ok(child) => children.push(child),
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    println!("spawned {}", children.len());
    for child in &mut children {
        child.kill()?;
        child.wait()?;
    }
    Ok(failure.map_or(0, |error| error.raw_os_error().unwrap_or(1)))
}

/// Forks without end, each child too.
fn bomb() {
    println!("bomb");
    drop(io::stdout().flush());
    loop {
        // SAFETY: this process has one thread, and the child does nothing but go on like this one.
        unsafe { libc::fork() };
    }
}

fn size() -> io::Result<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the pointer is to a winsize of ours, which the call fills.
    if unsafe { libc::ioctl(1, libc::TIOCGWINSZ, &raw mut size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((size.ws_col, size.ws_row))
}

/// Tells about the terminal; once more for each line that is typed.
fn terminal() -> io::Result<()> {
    let mut line = String::new();
    loop {
        let (columns, rows) = size()?;
        let controlling = fs::File::open("/dev/tty").is_ok();
        println!("size {columns}x{rows} controlling {controlling}");
        line.clear();
        if io::stdin().read_line(&mut line)? == 0 {
            return Ok(());
        }
    }
}

fn serve(port: u16) -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    println!("listening");
    io::stdout().flush()?;
    let (mut stream, _) = listener.accept()?;
    stream.write_all(b"hello from the pod")
}

/// The lines of `/proc/self/status` by their names.
pub(crate) fn status(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}
