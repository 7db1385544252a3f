//! What an authorized-keys file must look like: our marked block, and the user's bytes untouched.
