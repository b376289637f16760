"""An nginx that serves one file, and wrk against it or anything else: what the HTTP figure is measured with."""
import os
import re
import shutil
import socket
import subprocess
import tempfile

import harness
from measure import NotMeasured

CONF = """daemon off;
master_process on;
worker_processes 2;
pid {top}/pid;
error_log stderr error;
{user}events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  keepalive_requests 100000000;
  default_type application/json;
  client_body_temp_path {top}/body;
  proxy_temp_path {top}/proxy;
  fastcgi_temp_path {top}/fastcgi;
  uwsgi_temp_path {top}/uwsgi;
  scgi_temp_path {top}/scgi;
  server {{ listen 127.0.0.1:{port}; root {top}/www; }}
}}
"""


def need_tools():
    found = {name: shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin") for name in ("wrk", "nginx")}
    gone = [package for name, package in (("wrk", "wrk"), ("nginx", "nginx-light")) if not found[name]]
    if gone:
        raise NotMeasured(f"{' and '.join(gone)} missing: apt-get install -y {' '.join(gone)}")
    return found


class Nginx:
    def __init__(self, program, content):
        self.top = tempfile.mkdtemp(prefix="airlock-nginx-")
        os.mkdir(os.path.join(self.top, "www"))
        with open(os.path.join(self.top, "www/file"), "wb") as f:
            f.write(content)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        conf = os.path.join(self.top, "nginx.conf")
        with open(conf, "w") as f:
            f.write(CONF.format(top=self.top, port=self.port, user="user root;\n" if os.geteuid() == 0 else ""))
        self.log = open(os.path.join(self.top, "log"), "w+")
        self.process = subprocess.Popen([program, "-p", self.top, "-c", conf], stdin=subprocess.DEVNULL, stdout=self.log,
                                        stderr=self.log)
        self.url = f"http://127.0.0.1:{self.port}/file"
        harness.until(self.up, 10, "nginx listens")

    def up(self):
        if self.process.poll() is not None:
            self.log.seek(0)
            raise AssertionError(f"nginx ended with {self.process.returncode}: {self.log.read()[:400]}")
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        except OSError:
            return False

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.log.close()
        shutil.rmtree(self.top, ignore_errors=True)


def wrk(program, seconds, url, token):
    """Requests a second of `wrk -t1 -c32`; every answer must be a 2xx and no connection may fail."""
    argv = [program, "-t1", "-c32", f"-d{seconds}", "-H", f"Authorization: Bearer {token}", url]
    out = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 60, check=True).stdout
    fault = re.search(r"Non-2xx or 3xx responses: .*|Socket errors: .*", out)
    assert fault is None, f"wrk against {url}: {fault[0]}"
    return float(re.search(r"Requests/sec: +([\d.]+)", out)[1])
