# Fetches and serves layer.torrent of a directory there, from an address, until killed.
import sys

import libtorrent

addr, dir = sys.argv[1:]
session = libtorrent.session({
    "listen_interfaces": addr + ":6881",
    "outgoing_interfaces": addr,
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_incoming_utp": False,
    "enable_outgoing_utp": False,
    "alert_mask": libtorrent.alert.category_t.error_notification
    | libtorrent.alert.category_t.connect_notification
    | libtorrent.alert.category_t.status_notification
    | libtorrent.alert.category_t.tracker_notification,
})
session.add_torrent({"ti": libtorrent.torrent_info(dir + "/layer.torrent"), "save_path": dir})
while True:
    session.wait_for_alert(1000)
    for alert in session.pop_alerts():
        print(alert, flush=True)
