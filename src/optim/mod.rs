//! The update as plain values and pure functions: rule, clip, decay, schedule. Touches no memory.
