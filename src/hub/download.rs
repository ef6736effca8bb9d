//! One file into the cache: resumed if a part of it is there, checked, and only then given its name.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    thread,
};

use ring::digest::{Context, SHA256};

use super::{
    HubError, Progress,
    cache::{ModelCache, is_whole},
    client::{Client, Head, Listing},
};

/// So many broken connections in a row, each after little progress, end a download.
const ATTEMPTS: u32 = 5;
/// A connection that brought this many bytes was worth it.
const WORTHWHILE: u64 = 1 << 20;
/// So often may a file change while it is fetched.
const CHANGES: u32 = 3;

/// Makes `file` present in the snapshot of the listing's commit.
pub(super) fn fetch(
    client: &Client,
    cache: &ModelCache,
    listing: &Listing,
    file: &str,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    let listed = listing.files.get(file).copied().flatten();
    if is_whole(&cache.snapshot(&listing.commit).join(file), listed) {
        return Ok(());
    }
    for _ in 0..CHANGES {
        let head = client.head(&listing.commit, file)?;
        let _lock = cache
            .lock(&head.etag, || progress.notice(&format!("waiting for another process that is fetching {file}")))?;
        let blob = cache.blob(&head.etag);
        let mut transfer = Transfer { client, commit: &listing.commit, file, head: &head, progress: &mut *progress };
        if is_whole(&blob, head.size) || transfer.run(&blob)? {
            return cache.link(&head.etag, &listing.commit, file);
        }
    }
    Err(HubError::Malformed { what: file.to_string(), message: "changes while it is fetched; try again".to_string() })
}

struct Transfer<'a> {
    client: &'a Client<'a>,
    commit: &'a str,
    file: &'a str,
    head: &'a Head,
    progress: &'a mut dyn Progress,
}

/// How a connection ended.
enum End {
    /// As it should.
    Complete,
    /// Too early, for this reason.
    Cut(String),
    /// With another content than asked for.
    Changed,
}

impl Transfer<'_> {
    /// Fetches into `blob`. False if the file is no longer the one that `head` spoke of.
    fn run(&mut self, blob: &Path) -> Result<bool, HubError> {
        let mut part = Part::open(blob, self.head).map_err(HubError::io(blob))?;
        loop {
            let from_earlier = part.bytes > 0;
            match self.fill(&mut part) {
                Ok(true) => {}
                Ok(false) => {
                    part.remove();
                    return Ok(false);
                }
                Err(error) => {
                    if matches!(error, HubError::WrongSize { .. }) {
                        part.remove();
                    }
                    return Err(error);
                }
            }
            match part.wrong_hash(&self.head.etag) {
                None => break,
                // What an earlier run left may be broken: once more, without it.
                Some(_) if from_earlier => part.restart().map_err(HubError::io(&part.path))?,
                Some(received) => {
                    part.remove();
                    return Err(HubError::WrongHash {
                        file: self.file.to_string(),
                        expected: self.head.etag.clone(),
                        received,
                        endpoint: self.client.endpoint().to_string(),
                    });
                }
            }
        }
        // The name must not survive a power cut that the content does not.
        part.file.sync_all().and_then(|()| fs::rename(&part.path, blob)).map_err(HubError::io(blob))?;
        self.progress.finish();
        Ok(true)
    }

    /// Connects until `part` is complete. False if the file has changed.
    fn fill(&mut self, part: &mut Part) -> Result<bool, HubError> {
        if self.head.size.is_some_and(|size| part.bytes > size) {
            part.restart().map_err(HubError::io(&part.path))?;
        }
        self.progress.begin(self.file, self.head.size.unwrap_or_default(), part.bytes);
        let mut failures = 0;
        while self.head.size != Some(part.bytes) {
            let before = part.bytes;
            let reason = match self.append(part) {
                Ok(End::Complete) => return Ok(true),
                Ok(End::Changed) => return Ok(false),
                Ok(End::Cut(reason)) | Err(HubError::NoNetwork { reason, .. }) => reason,
                Err(error @ HubError::Server { .. }) => error.to_string(),
                Err(error) => return Err(error),
            };
            failures = if part.bytes >= before + WORTHWHILE { 0 } else { failures + 1 };
            if failures == ATTEMPTS {
                return Err(HubError::Interrupted {
                    file: self.file.to_string(),
                    received: part.bytes,
                    expected: self.head.size.unwrap_or_default(),
                    reason,
                });
            }
            thread::sleep(self.client.pause(failures));
        }
        Ok(true)
    }

    /// Appends to `part` what one connection brings.
    fn append(&mut self, part: &mut Part) -> Result<End, HubError> {
        let answer = self.client.get(self.commit, self.file, self.head, part.bytes)?;
        if answer.differs(self.head) {
            return Ok(End::Changed);
        }
        if answer.status == 416 || answer.start != part.bytes {
            // The server starts elsewhere, most likely because it does not do ranges.
            part.restart().map_err(HubError::io(&part.path))?;
            self.progress.begin(self.file, self.head.size.unwrap_or_default(), 0);
            if answer.start != 0 || answer.status == 416 {
                return Ok(End::Cut("the server sent another range than asked for".to_string()));
            }
        }
        if let (Some(expected), Some(total)) = (self.head.size, answer.total)
            && expected != total
        {
            return Err(self.wrong_size(total));
        }
        let mut body = answer.body.into_reader();
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) => return Ok(End::Cut(error.to_string())),
            };
            part.append(&buffer[..read]).map_err(HubError::io(&part.path))?;
            self.progress.advance(read as u64);
            if self.head.size.is_some_and(|size| part.bytes > size) {
                return Err(self.wrong_size(part.bytes));
            }
        }
        match self.head.size {
            Some(size) if part.bytes < size => Ok(End::Cut("the connection was closed".to_string())),
            _ => Ok(End::Complete),
        }
    }

    fn wrong_size(&self, received: u64) -> HubError {
        HubError::WrongSize {
            file: self.file.to_string(),
            expected: self.head.size.unwrap_or_default(),
            received,
            endpoint: self.client.endpoint().to_string(),
        }
    }
}

/// What has arrived of a file, `<etag>.incomplete` beside the blob as with other tools.
struct Part {
    path: PathBuf,
    file: File,
    bytes: u64,
    digest: Context,
}

impl Part {
    fn open(blob: &Path, head: &Head) -> io::Result<Self> {
        let path = blob.with_file_name(format!("{}.incomplete", head.etag));
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::options().read(true).append(true).create(true).open(&path)?;
        let mut digest = Context::new(&SHA256);
        let bytes = io::copy(&mut file, &mut Hashing(&mut digest))?;
        Ok(Self { path, file, bytes, digest })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.digest = Context::new(&SHA256);
        self.bytes = 0;
        Ok(())
    }

    /// The SHA-256 of the content if `etag` is one and another.
    fn wrong_hash(&self, etag: &str) -> Option<String> {
        let is_sha256 = etag.len() == 64 && etag.chars().all(|it| it.is_ascii_hexdigit());
        let digest = self.digest.clone().finish();
        let received: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        (is_sha256 && !received.eq_ignore_ascii_case(etag)).then_some(received)
    }

    /// Best effort: what stays is found wrong again by the next run.
    fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

struct Hashing<'a>(&'a mut Context);

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
