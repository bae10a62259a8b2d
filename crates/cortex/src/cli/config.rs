//! Where the hub is and who one is: flags over environment over what `cortex login` stored.

use super::args::{Format, Global};
use crate::{Client, Credentials, Error, TokenStore, Tokens};
use mesh_process::config::{BadSetting, env};
use mesh_process::files;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

pub const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// The variables that matter, as they are set.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    pub url: Option<String>,
    pub api_key: Option<String>,
    pub config_dir: Option<PathBuf>,
    pub xdg_config_home: Option<PathBuf>,
    pub home: Option<PathBuf>,
}

impl Environment {
    pub fn read() -> Result<Self, BadSetting> {
        Ok(Self {
            url: env("CORTEX_URL")?,
            api_key: env("CORTEX_API_KEY")?,
            config_dir: env("CORTEX_CONFIG_DIR")?.map(PathBuf::from),
            xdg_config_home: env("XDG_CONFIG_HOME")?.map(PathBuf::from),
            home: env("HOME")?.map(PathBuf::from),
        })
    }
    /// The folder of `login.json`. A relative XDG folder counts as absent, as its specification has it.
    fn folder(&self) -> Option<PathBuf> {
        let xdg = || self.xdg_config_home.clone().filter(|p| p.is_absolute());
        let home = || self.home.as_ref().map(|h| h.join(".config"));
        self.config_dir.clone().or_else(|| xdg().or_else(home).map(|base| base.join("cortex")))
    }
}

/// What a command works with.
#[derive(Debug)]
pub struct Settings {
    pub url: String,
    pub format: Format,
    pub store: LoginFile,
    pub home: Option<PathBuf>,
    api_key: Option<String>,
}

impl Settings {
    /// Decides between flags, environment and file. Nothing is sent.
    pub fn resolve(flags: &Global, environment: Environment) -> Result<Self, Error> {
        let store = LoginFile { path: environment.folder().map(|f| f.join("login.json")) };
        let home = environment.home.clone();
        let url = match flags.url.clone().or(environment.url) {
            Some(url) => url,
            None => store.read()?.current.unwrap_or_else(|| DEFAULT_URL.to_owned()),
        };
        // One spelling, because logins are kept by it.
        let url = Client::new(&url, Credentials::None)?.url().to_owned();
        Ok(Self { url, format: flags.output, store, home, api_key: flags.api_key.clone().or(environment.api_key) })
    }
    pub fn uses_api_key(&self) -> bool {
        self.api_key.is_some()
    }
    /// A client that acts for the caller; without key and log-in it asks as nobody, and the hub says
    /// what it thinks of that.
    pub fn client(&self) -> Result<Client, Error> {
        if let Some(key) = &self.api_key {
            return Client::new(&self.url, Credentials::ApiKey(key.clone()));
        }
        match self.login_client()? {
            Some(client) => Ok(client),
            None => Client::new(&self.url, Credentials::None),
        }
    }
    /// A client that acts by the stored log-in alone.
    pub fn login_client(&self) -> Result<Option<Client>, Error> {
        let Some(login) = self.store.read()?.hubs.remove(&self.url) else { return Ok(None) };
        let store = StoredLogin { file: self.store.clone(), url: self.url.clone() };
        Client::with_store(&self.url, login.tokens, Box::new(store)).map(Some)
    }
}

/// The content of `login.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Logins {
    /// The hub that was logged in to last.
    pub current: Option<String>,
    #[serde(default)]
    pub hubs: BTreeMap<String, Login>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Login {
    pub username: String,
    #[serde(flatten)]
    pub tokens: Tokens,
}

/// The file `login.json`, 0600, always replaced as a whole and under a lock beside it.
#[derive(Debug, Clone)]
pub struct LoginFile {
    /// `None` where there is no home, as in some containers: nobody is logged in, and nobody can.
    path: Option<PathBuf>,
}

impl LoginFile {
    pub fn path(&self) -> io::Result<&Path> {
        self.path.as_deref().ok_or_else(|| io::Error::other("HOME is not set; name a folder with CORTEX_CONFIG_DIR"))
    }
    pub fn read(&self) -> Result<Logins, Error> {
        let Some(path) = &self.path else { return Ok(Logins::default()) };
        load(path).map_err(|e| Error::Setting(format!("{}: {e}; remove the file and log in again", path.display())))
    }
    /// Changes the file while no other process does.
    pub fn update(&self, change: impl FnOnce(&mut Logins)) -> io::Result<()> {
        let _held = self.hold()?;
        self.replace(change)
    }

    /// Whoever calls this holds the lock.
    fn replace(&self, change: impl FnOnce(&mut Logins)) -> io::Result<()> {
        let path = self.path()?;
        let mut logins = load(path)?;
        change(&mut logins);
        let text = serde_json::to_vec_pretty(&logins).map_err(io::Error::other)?;
        files::write_private(path, &text)
    }
    fn try_hold(&self) -> io::Result<Option<files::Lock>> {
        let path = self.path()?;
        if let Some(folder) = path.parent() {
            files::private_dir(folder)?;
        }
        files::Lock::try_take(&path.with_file_name("login.lock"))
    }
    fn hold(&self) -> io::Result<files::Lock> {
        for _ in 0..400 {
            if let Some(held) = self.try_hold()? {
                return Ok(held);
            }
            std::thread::sleep(std::time::Duration::from_millis(25));
        }
        Err(io::Error::other("another cortex command holds login.lock"))
    }
}

fn load(path: &Path) -> io::Result<Logins> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Logins::default()),
        Err(e) => Err(e),
    }
}

/// The log-in for one hub in the file.
struct StoredLogin {
    file: LoginFile,
    url: String,
}

impl TokenStore for StoredLogin {
    fn try_lock(&self) -> io::Result<Option<Box<dyn Send>>> {
        Ok(self.file.try_hold()?.map(|lock| Box::new(lock) as Box<dyn Send>))
    }
    fn load(&self) -> io::Result<Option<Tokens>> {
        Ok(load(self.file.path()?)?.hubs.remove(&self.url).map(|l| l.tokens))
    }
    fn save(&self, tokens: &Tokens) -> io::Result<()> {
        self.file.replace(|logins| {
            // Absent: somebody logged out meanwhile, and that holds.
            if let Some(login) = logins.hubs.get_mut(&self.url) {
                login.tokens = tokens.clone();
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(dir: &Path) -> Environment {
        Environment { config_dir: Some(dir.to_owned()), ..Environment::default() }
    }

    #[test]
    fn flag_over_environment_over_file() {
        let dir = tempfile::tempdir().unwrap();
        let resolve = |flag: Option<&str>, env: Option<&str>| {
            let flags = Global { url: flag.map(str::to_owned), ..Global::default() };
            let environment = Environment { url: env.map(str::to_owned), ..environment(dir.path()) };
            Settings::resolve(&flags, environment).map(|s| s.url)
        };
        assert_eq!(resolve(None, None).unwrap(), DEFAULT_URL);
        let path = dir.path().join("login.json");
        let file = LoginFile { path: Some(path.clone()) };
        file.update(|l| l.current = Some("http://stored".into())).unwrap();
        assert_eq!(resolve(None, None).unwrap(), "http://stored");
        assert_eq!(resolve(None, Some("http://env/")).unwrap(), "http://env");
        assert_eq!(resolve(Some("http://flag"), Some("http://env")).unwrap(), "http://flag");
        std::fs::write(&path, "{").unwrap();
        assert!(resolve(None, None).unwrap_err().to_string().contains("log in again"));
    }

    #[test]
    fn folders() {
        let e = |dir: &str, xdg: &str, home: &str| {
            let p = |t: &str| (!t.is_empty()).then(|| PathBuf::from(t));
            Environment { config_dir: p(dir), xdg_config_home: p(xdg), home: p(home), ..Environment::default() }.folder()
        };
        assert_eq!(e("/c", "/x", "/h"), Some("/c".into()));
        assert_eq!(e("", "/x", "/h"), Some("/x/cortex".into()));
        assert_eq!(e("", "relative", "/h"), Some("/h/.config/cortex".into()));
        assert_eq!(e("", "", ""), None);
    }
}
