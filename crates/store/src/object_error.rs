//! [`ObjectError`]: why an object cannot be used.

/// Why an object cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// The address is not of the form `s3://BUCKET/KEY`.
    #[error("`{url}`: {what}; expected s3://BUCKET/KEY, such as s3://snapshots/guest-17")]
    Url {
        /// The address.
        url: String,
        /// The fault.
        what: String,
    },
    /// A variable is missing, or has no valid value.
    #[error("{url}: {what}")]
    Config {
        /// The object.
        url: String,
        /// The missing or invalid variable, and the remedy.
        what: String,
    },
    /// The thread of the client could not be started.
    #[error("{url}: starting the store's client: {error}")]
    Thread {
        /// The object.
        url: String,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// This program was built without the client of object stores.
    #[error(
        "{url}: this program was built without object stores; build it with `--features s3`, or use a file"
    )]
    NotBuilt {
        /// The object.
        url: String,
    },
}
