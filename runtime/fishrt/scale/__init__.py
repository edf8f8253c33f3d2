"""Work that Ray spreads over processes and machines. Only this folder imports Ray."""
