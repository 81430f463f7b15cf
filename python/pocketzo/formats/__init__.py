"""Every file that PocketZO writes: bundle, safetensors, journal."""
