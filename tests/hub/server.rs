//! An HTTP/1.1 server on 127.0.0.1 that answers what a closure says, and a small Hub made of it.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use ring::digest::{SHA256, digest};

pub const ID: &str = "org/model";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
    /// How many bytes of body were sent in answer.
    pub sent: usize,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub fn is(&self, method: &str, end_of_path: &str) -> bool {
        self.method == method && self.path.ends_with(end_of_path)
    }
}

#[derive(Debug, Clone)]
pub struct Response {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Close, or with `stall` fall silent, after so many bytes of the body.
    cut: Option<usize>,
    stall: bool,
    pause: Duration,
}

impl Response {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), body, cut: None, stall: false, pause: Duration::ZERO }
    }

    pub fn header(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.retain(|(it, _)| *it != name);
        self.headers.push((name, value.to_string()));
        self
    }

    pub fn cut(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }

    pub fn stall(mut self, bytes: usize) -> Self {
        self.stall = true;
        self.cut(bytes)
    }

    /// Waits before the body.
    pub fn pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    fn send(&self, request: &Request, mut stream: TcpStream) -> usize {
        let mut head = format!("HTTP/1.1 {} Scripted\r\nConnection: close\r\n", self.status);
        if !self.headers.iter().any(|(name, _)| *name == "Content-Length") {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        // An empty value stands for a header that is not sent.
        for (name, value) in self.headers.iter().filter(|(_, value)| !value.is_empty()) {
            head += &format!("{name}: {value}\r\n");
        }
        let body: &[u8] = if request.method == "HEAD" { &[] } else { &self.body };
        let body = &body[..self.cut.unwrap_or(usize::MAX).min(body.len())];
        let _ = stream.write_all((head + "\r\n").as_bytes());
        thread::sleep(self.pause);
        let _ = stream.write_all(body);
        if self.stall {
            thread::sleep(Duration::from_secs(3));
        }
        body.len()
    }
}

pub struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// `answer` gets each request and how many of the same method and path came before it.
    pub fn start(answer: impl Fn(&Request, usize) -> Response + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let log: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (answer, entries) = (Arc::new(answer), log.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, entries) = (answer.clone(), entries.clone());
                thread::spawn(move || {
                    let stream = stream.unwrap();
                    let Some(request) = read_request(&stream) else { return };
                    let (index, nth) = {
                        let mut entries = entries.lock().unwrap();
                        let is_same = |it: &&Request| it.method == request.method && it.path == request.path;
                        let nth = entries.iter().filter(is_same).count();
                        entries.push(request.clone());
                        (entries.len() - 1, nth)
                    };
                    let response = answer(&request, nth);
                    let length = if request.method == "HEAD" { 0 } else { response.body.len() };
                    // Before it is sent: the client may be done, and a test look, before the thread goes on.
                    entries.lock().unwrap()[index].sent = length.min(response.cut.unwrap_or(usize::MAX));
                    response.send(&request, stream);
                });
            }
        });
        Self { address, log }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// The requests of one method for a path.
    pub fn of(&self, method: &str, end_of_path: &str) -> Vec<Request> {
        self.requests().into_iter().filter(|it| it.is(method, end_of_path)).collect()
    }

    /// The bytes of all bodies sent for a path.
    pub fn sent(&self, end_of_path: &str) -> usize {
        self.of("GET", end_of_path).iter().map(|it| it.sent).sum()
    }
}

/// An address where nothing listens.
pub fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let first = lines.next()?;
    let mut first = first.split(' ').map(String::from);
    let (method, path) = (first.next()?, first.next()?);
    let pair = |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_string()));
    Some(Request { method, path, headers: lines.filter_map(pair).collect(), sent: 0 })
}

/// The file as a server that knows ranges gives it.
pub fn ranged(request: &Request, content: &[u8], etag: &str) -> Response {
    let etag = format!("\"{etag}\"");
    let is_current = request.header("if-range").is_none_or(|it| it == etag);
    let range = request.header("range").filter(|_| is_current);
    let response = match range.and_then(|it| it.strip_prefix("bytes=")?.split_once('-')) {
        None => Response::new(200, content),
        Some((start, end)) => {
            let (start, end) = (start.parse().unwrap(), end.parse().unwrap_or(usize::MAX).min(content.len() - 1));
            if start >= content.len() {
                Response::new(416, "out of range").header("Content-Range", format!("bytes */{}", content.len()))
            } else {
                let range = format!("bytes {start}-{end}/{}", content.len());
                Response::new(206, &content[start..=end]).header("Content-Range", range)
            }
        }
    };
    response.header("ETag", etag)
}

/// What a Hub holds at one commit.
#[derive(Clone)]
pub struct Repo {
    pub commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Where the large files are; None: at the Hub itself.
    storage: Option<String>,
}

impl Repo {
    /// A model with small files and `model.safetensors`.
    pub fn new() -> Self {
        Self { commit: COMMIT.to_string(), files: BTreeMap::new(), storage: None }
            .with("config.json", "{}")
            .with("tokenizer.json", "{\"model\": {}}")
            .with("model.safetensors", weights(200_000, 1))
    }

    pub fn with(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.insert(name.to_string(), content.into());
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.files.remove(name);
        self
    }

    pub fn stored_at(mut self, server: &Server) -> Self {
        self.storage = Some(server.url());
        self
    }

    pub fn content(&self, name: &str) -> &[u8] {
        &self.files[name]
    }

    pub fn etag(&self, name: &str) -> String {
        if is_large(name) { sha256(self.content(name)) } else { sha256(self.content(name))[..40].to_string() }
    }

    pub fn start(self) -> Server {
        Server::start(move |request, _| self.answer(request))
    }

    /// What the Hub answers: the listing, small files itself, large files from the storage behind it.
    pub fn answer(&self, request: &Request) -> Response {
        let refuse = |code| Response::new(404, "no").header("X-Error-Code", code);
        let path = request.path.as_str();
        if let Some(revision) = path.strip_prefix(&format!("/api/models/{ID}/revision/")) {
            let revision = revision.strip_suffix("?blobs=true").unwrap();
            if !["main", "refs%2Fpr%2F1", &self.commit].contains(&revision) {
                return refuse("RevisionNotFound");
            }
            let siblings = self.files.iter().map(|(name, content)| {
                serde_json::json!({ "rfilename": name, "size": content.len(), "blobId": self.etag(name) })
            });
            let info = serde_json::json!({ "id": ID, "sha": self.commit, "siblings": siblings.collect::<Vec<_>>() });
            return Response::new(200, info.to_string());
        }
        let Some(name) = path.strip_prefix(&format!("/{ID}/resolve/{}/", self.commit)) else {
            return refuse("RepoNotFound");
        };
        let Some(content) = self.files.get(name) else { return refuse("EntryNotFound") };
        let response = match &self.storage {
            Some(storage) if is_large(name) => {
                Response::new(302, "see there").header("Location", format!("{storage}/{name}?signature=secret"))
            }
            _ => ranged(request, content, &self.etag(name)),
        };
        let response = response.header("X-Repo-Commit", &self.commit);
        if is_large(name) {
            let etag = format!("\"{}\"", self.etag(name));
            response.header("X-Linked-Etag", etag).header("X-Linked-Size", content.len())
        } else {
            response
        }
    }

    /// What the storage behind the Hub answers: its ETags are its own.
    pub fn answer_as_storage(&self, request: &Request) -> Response {
        let name = request.path.split(['/', '?']).nth(1).unwrap();
        ranged(request, self.content(name), &format!("storage-{}", &self.etag(name)[..8]))
    }
}

fn is_large(name: &str) -> bool {
    [".safetensors", ".bin", ".pt"].iter().any(|end| name.ends_with(end))
}

pub fn sha256(content: &[u8]) -> String {
    digest(&SHA256, content).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A safetensors file with one tensor of `bytes` bytes.
pub fn weights(bytes: usize, seed: u32) -> Vec<u8> {
    let header = format!("{{\"w\":{{\"dtype\":\"U8\",\"shape\":[{bytes}],\"data_offsets\":[0,{bytes}]}}}}");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend((0..bytes as u32).map(|it| (it.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8));
    file
}
