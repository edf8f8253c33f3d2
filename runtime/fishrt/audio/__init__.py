"""Audio files in and out, loudness, playback."""
