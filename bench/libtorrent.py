# A client of libtorrent that seeds or fetches one torrent, for bench/systems.go.
# It says ready, waits for the end of the named pipe, and says complete.
import sys
import libtorrent as lt

role, torrent, directory, port, gate = sys.argv[1:]

# On a LAN: TCP alone, in the clear, nobody looked for elsewhere; everyone is
# unchoked, connected to and told of at once.
session = lt.session({
    "listen_interfaces": "0.0.0.0:" + port,
    "enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False,
    "enable_incoming_utp": False, "enable_outgoing_utp": False,
    "in_enc_policy": 2, "out_enc_policy": 2,
    "unchoke_slots_limit": -1, "connections_limit": 1000, "connection_speed": 500,
    "listen_queue_size": 1000, "min_announce_interval": 5, "allow_multiple_connections_per_ip": True,
    "alert_mask": lt.alert.category_t.status_notification | lt.alert.category_t.error_notification,
})
params = lt.add_torrent_params()
params.ti = lt.torrent_info(torrent)
params.save_path = directory
params.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
params.storage_mode = lt.storage_mode_t.storage_mode_sparse
if role == "seed":
    params.flags |= lt.torrent_flags.seed_mode
else:
    print("waiting", flush=True)
    open(gate).read()
handle = session.add_torrent(params)
while True:
    session.wait_for_alert(60000)
    for alert in session.pop_alerts():
        if isinstance(alert, lt.torrent_finished_alert):
            print("complete", flush=True)
        elif isinstance(alert, lt.listen_succeeded_alert):
            print("ready", flush=True)
        elif "error" in type(alert).__name__ or "failed" in type(alert).__name__:
            print(alert, flush=True)
