"""Folders of models; the test sets `models_dir`."""

import os

models_dir = ""
_folders: dict = {}


def add_model_folder_path(name, path, is_default=False):
    paths = _folders.setdefault(name, [])
    if path not in paths:
        paths.append(path)


def get_folder_paths(name):
    return list(_folders[name])


def get_filename_list(name):
    found = []
    for folder in _folders[name]:
        found += os.listdir(folder)
    return sorted(found)


def get_full_path(name, file):
    for folder in _folders[name]:
        path = os.path.join(folder, os.path.relpath(os.path.join("/", file), "/"))
        if os.path.isfile(path):
            return path
    return None
