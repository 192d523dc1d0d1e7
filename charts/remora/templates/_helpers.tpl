{{- define "remora.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "remora.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "remora.labels" -}}
{{ include "remora.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "remora.image" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* A container without any right: no capability, nothing to gain, nothing to write but its volumes. */}}
{{- define "remora.locked" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "remora.tls" -}}
{{- if ne .Values.tls.mode "none" }}true{{ end }}
{{- end }}

{{- define "remora.check" -}}
{{- if and .Values.autoscaling.enabled (eq .Values.tls.mode "none") }}
{{- fail "autoscaling.enabled needs the agents' metrics over TLS: set tls.mode to helm or secret" }}
{{- end }}
{{- if and .Values.metrics.serviceMonitor.enabled (eq .Values.tls.mode "none") }}
{{- fail "metrics.serviceMonitor.enabled needs the agents' metrics over TLS: set tls.mode to helm or secret" }}
{{- end }}
{{- end }}
