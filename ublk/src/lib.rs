//! ublk front end: presents a Tidegate volume as `/dev/ublkbN`.
