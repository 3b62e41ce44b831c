//! Waiting for something that nobody announces.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks `probe` until it has an answer, but not longer than `limit`. The pause between two
/// questions grows from 10 ms to 200 ms: on an emulated machine, asking is not free.
pub async fn until<T, F, Fut>(what: &str, limit: Duration, mut probe: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<T>>>,
{
    let start = Instant::now();
    let mut pause = Duration::from_millis(10);
    loop {
        if let Some(answer) = probe().await? {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            bail!("{what}: not within {} s", limit.as_secs_f32());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_answer_is_returned_and_the_limit_named() {
        let mut left = 3;
        let answer = until("three", Duration::from_secs(5), || {
            left -= 1;
            let answer = (left == 0).then_some("here");
            async move { Ok(answer) }
        });
        assert_eq!(answer.await.unwrap(), "here");
        let never = until("pigs fly", Duration::from_millis(30), || async {
            Ok(None::<()>)
        });
        assert_eq!(
            never.await.unwrap_err().to_string(),
            "pigs fly: not within 0.03 s"
        );
    }
}
