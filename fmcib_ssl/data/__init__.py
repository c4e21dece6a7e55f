"""From a table of lesions to batches of views. Import from the modules: some need SimpleITK, some not even torch."""
