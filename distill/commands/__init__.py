"""The commands, one module each: options flow in, one call goes out, its result is printed."""
