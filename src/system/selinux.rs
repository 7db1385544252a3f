//! SELinux labels of files (selinux(8)): read from one, given to another.
//!
//! The label that a new file gets is the kernel's business: the folder's type, or the transition that the
//! policy names. May not live here: policy, the labels that files ought to have (restorecon(8)).

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};
use rustix::io::{Errno, Result};

/// The kernel makes this folder when it has SELinux on, whether or not anything is mounted there.
const SELINUX: &str = "/sys/fs/selinux";

const LABEL: &str = "security.selinux";

/// Longest label that is read, in bytes. The kernel's own limit for one is a page.
const MAX_LABEL: usize = 4096;

/// The file's label as it is kept, a final NUL perhaps included. None if it has none, if its file system
/// keeps none, or if this kernel has SELinux off: what was left of a label then means nothing, and
/// nobody but an administrator of the whole system may set it (capabilities(7), `CAP_SYS_ADMIN`).
///
/// # Errors
/// The policy does not let the label be read, or it is longer than a page.
pub fn label(file: impl AsFd) -> Result<Option<Vec<u8>>> {
    if !Path::new(SELINUX).is_dir() {
        return Ok(None);
    }
    let mut label = vec![0; MAX_LABEL];
    match fgetxattr(file, LABEL, &mut label[..]) {
        Ok(length) => {
            label.truncate(length);
            Ok(Some(label))
        }
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives the file this label, unless the kernel gave it the same one already: then the policy is not asked.
///
/// # Errors
/// The policy does not allow it: `relabelfrom` the label that the file has, `relabelto` this one.
pub fn set_label(file: impl AsFd, wanted: &[u8]) -> Result<()> {
    if label(&file)?.as_deref() == Some(wanted) {
        return Ok(());
    }
    fsetxattr(file, LABEL, wanted, XattrFlags::empty())
}
