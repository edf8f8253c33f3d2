"""Speech over HTTP, WebSockets and Wyoming: fields of every dialect, and replies."""
