//! Many schedules of many threads, with time that passes, servers that end, and calls that are interrupted.

super::model!(shuttle::sync, shuttle::thread);
